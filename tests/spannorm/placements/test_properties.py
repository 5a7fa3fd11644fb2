"""Any depth, width, norm and init: outputs and gradients are finite, and no token sees a later one."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.initialization import initialize
from lightning_modules.transformer import Transformer
from spannorm import PLACEMENTS
from spannorm.initialization import TARGETS
from tests.support.models import VOCAB_SIZE, tiny_config

OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "spannorm": {"first_norm": st.booleans()},
    **{name: {"gpas": st.booleans()} for name in ("prenorm", "sandwich", "lnscaling", "deepnorm")},
    "mixln": {"post_fraction": st.floats(0, 1), "gpas": st.booleans()},
    "keel": {"alpha": st.sampled_from(["2L", "sqrt"]) | st.floats(0.5, 10), "ease_in": st.booleans()},
    "siamesenorm": dict.fromkeys(("count_sublayers", "normed_sum", "head_norms"), st.booleans()),
    "b2t": {"last_skip": st.booleans()},
    "hc": {"streams": st.integers(2, 5), "scale": st.floats(0.001, 1), "static": st.booleans()},
    "mhc": {
        "streams": st.integers(2, 5),
        "scale": st.floats(0.001, 1),
        "std": st.floats(0.001, 1),
        "start": st.sampled_from(["identity", "uniform"]),
        "iterations": st.integers(1, 30),
    },
    "ihc": {"streams": st.integers(2, 5), "std": st.floats(0.001, 1)},
    "gr": {"streams": st.integers(2, 5), "rank": st.none() | st.integers(1, 8), "std": st.floats(0.001, 1)},
}
INITS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "default": {},
    "plain": {"std": st.floats(0.01, 0.2), "embedding_std": st.none() | st.floats(0.01, 1)},
    "fan_in": {},
    "megatron": {"std": st.none() | st.floats(0.01, 0.2), "head": st.sampled_from(["std", "fan_in"])},
    "scale_init": {
        "factor": st.sampled_from(["blocks", "sublayers"]),
        "targets": st.lists(st.sampled_from(TARGETS), unique=True),
    },
    "deepnorm": {},
    "b2t": {"base": st.sampled_from(["xavier", "fairseq"])},
    "subln": {},
    "deepscalelm": {"correlation": st.floats(0.2, 1)},
}


@st.composite
def models(draw: st.DrawFn, placement: str, ffn: str) -> Transformer:
    init, heads = draw(st.sampled_from(sorted(INITS))), draw(st.sampled_from([1, 2, 4]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    config = tiny_config(
        placement=placement,
        placement_options=draw(st.fixed_dictionaries({}, optional=OPTIONS.get(placement, {}))),
        init=init,
        init_options=draw(st.fixed_dictionaries({}, optional=INITS[init])),
        # Without norms nothing bounds the stream, and some of the numbers above make it overflow.
        norm=draw(st.sampled_from([norm for norm in PLACEMENTS[placement].norms if norm != "none"])),
        ffn=ffn,
        num_layers=draw(st.integers(1, 6)),
        num_heads=heads,
        num_kv_heads=draw(st.sampled_from([1, heads])),
        dim=heads * draw(st.sampled_from([4, 8, 16])),
        tie_embeddings=draw(st.booleans()),
    )
    model = Transformer(config, VOCAB_SIZE)
    initialize(model)
    return model


@pytest.mark.parametrize("ffn", ["dense", "moe"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_finite_and_causal(placement: str, ffn: str, data: st.DataObject) -> None:
    model = data.draw(models(placement, ffn))
    length = data.draw(st.integers(2, 12))
    changed = data.draw(st.integers(0, length - 1))
    sequence = torch.randint(VOCAB_SIZE, (2, length))
    other = sequence.clone()
    other[:, changed] = (sequence[:, changed] + 1) % VOCAB_SIZE

    logits, router_stats = model(sequence)
    loss = logits.square().mean() + sum(stats.load_balancing_loss + stats.z_loss for stats in router_stats)
    loss.backward()
    assert torch.isfinite(logits).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name

    with torch.no_grad():
        difference = (model(other)[0] - logits).abs().amax(dim=(0, 2)) / logits.abs().max()
    assert (difference[:changed] < 1e-5).all()
    assert difference[changed] > 1e-5
