"""signal_propagation and representation_collapse against loops in float64, and that training does not notice them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.theory import SCHEMES, predict, read_gains
from callbacks.monitors.block_monitor import BlockMonitor
from callbacks.monitors.representation_collapse import RepresentationCollapse
from callbacks.monitors.signal_propagation import SignalPropagation
from core.errors import ConfigError
from lightning_modules.layers.rope import rope_tables
from lightning_modules.transformer import Block, Transformer
from tests.support.fitting import Recorder, fit
from tests.support.models import make_module, tokens
from tests.support.norms import in_float64

SEQUENCES, POSITIONS = 2, 7


def states_by_hand(model: Transformer, batch: Tensor) -> list[dict[str, Any]]:
    """Of each block: the state before and after, what attention reads and what the branches give, [batch, seq, dim]."""
    rope = rope_tables(batch.size(1), model.config.head_width, model.config.rope_theta, torch.device("cpu"))
    state, seen = model.embedding(batch), []
    for block in model.blocks:
        assert isinstance(block, Block)
        kept: dict[str, Any] = {"before": state, "block": block}

        def attn(x: Tensor, block: Block = block, kept: dict[str, Any] = kept) -> Tensor:
            kept["read"], kept["attn"] = x, block.attn(x, rope)
            return kept["attn"]

        def ffn(x: Tensor, block: Block = block, kept: dict[str, Any] = kept) -> Tensor:
            kept["ffn"] = block.ffn(x)[0]
            return kept["ffn"]

        kept["after"] = state = block.placement(state, attn, ffn)
        seen.append(kept)
    return seen


def attention_by_hand(block: Block, x: Tensor) -> tuple[float, float]:
    """Largest logit and relative entropy, query by query and head by head."""
    size = block.attn.head_dim
    cos, sin = rope_tables(x.size(1), size, 1e4, torch.device("cpu"))
    largest, entropies = -math.inf, []
    for sequence in x:
        for head in range(4):
            rows = slice(head * size, (head + 1) * size)
            q, k = (sequence @ projection.weight[rows].T for projection in (block.attn.q_proj, block.attn.k_proj))
            q, k = (h * cos + torch.cat((-h[:, size // 2 :], h[:, : size // 2]), 1) * sin for h in (q, k))
            for t in range(len(q)):
                logits = [(q[t] @ k[s]).item() / math.sqrt(size) for s in range(t + 1)]
                largest = max(largest, *logits)
                weights = np.exp(logits) / np.exp(logits).sum()
                if t > 0:
                    entropies.append(-(weights * np.log(weights)).sum() / math.log(t + 1))
    return largest, float(np.mean(entropies))


def square(x: Tensor) -> float:
    return x.square().mean().item()


def signal_by_hand(kept: dict[str, Any]) -> dict[str, float]:
    after = kept["after"]
    logit_max, entropy = attention_by_hand(kept["block"], kept["read"])
    per_token = [(token**4).mean() / (token**2).mean() ** 2 for token in after.flatten(0, 1).numpy()]
    return {
        "variance": square(after),
        "attn_ratio": square(kept["attn"]) / square(kept["before"]),
        "ffn_ratio": square(kept["ffn"]) / square(kept["before"]),
        "max": max(abs(value) for value in after.flatten().tolist()),
        "kurtosis": float(np.mean(per_token)),
        "attn_logit_max": logit_max,
        "attn_entropy": entropy,
    }


def representation_by_hand(kept: dict[str, Any]) -> dict[str, float]:
    cosines, ranks, between = [], [], []
    for before, after in zip(kept["before"].numpy(), kept["after"].numpy(), strict=True):
        unit = after / np.linalg.norm(after, axis=1, keepdims=True)
        cosines += [unit[s] @ unit[t] for s in range(len(unit)) for t in range(len(unit)) if s != t]
        share = np.linalg.svd(after, compute_uv=False)
        share = share / share.sum()
        ranks.append(np.exp(-(share * np.log(share)).sum()))
        between += [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(before, after, strict=True)]
    return {"token_cosine": np.mean(cosines), "effective_rank": np.mean(ranks), "block_cosine": np.mean(between)}


@pytest.mark.parametrize("ffn", ["dense", "moe"])
@pytest.mark.parametrize(
    ("monitor", "by_hand"), [(SignalPropagation, signal_by_hand), (RepresentationCollapse, representation_by_hand)]
)
def test_figures_are_those_of_loops(tmp_path: Path, monitor: Any, by_hand: Any, ffn: str) -> None:
    """Sampled in steps 1 and 2 of 2, of which the second has other weights; under accumulation."""
    module, recorder, doubles = make_module(ffn=ffn, optim={"lr": 1e-2}), Recorder(), []
    callback = monitor(every_n_steps=2, sequences=SEQUENCES, positions=POSITIONS)
    callback.before_sample = lambda trainer, pl_module, num_positions: doubles.append(in_float64(pl_module.model))
    batches = [tokens(3, 12) for _ in range(4)]
    fit(tmp_path, module, *batches, callbacks=[callback], logger=recorder, max_steps=2, accumulate_grad_batches=2)
    for step, (model, batch) in enumerate(zip(doubles, batches[::2], strict=True)):
        with torch.no_grad():
            seen = states_by_hand(model, batch[:SEQUENCES, :POSITIONS])
            for number, kept in enumerate(seen, start=1):
                for figure, expected in by_hand(kept).items():
                    logged = recorder.series(f"{callback.prefix}/block_{number}/{figure}")[step]
                    assert logged == pytest.approx(expected, rel=2e-4), (number, figure)


def test_the_theory_stands_beside_the_measurement(tmp_path: Path) -> None:
    module, recorder = make_module(placement="prenorm", init="fan_in", dim=64, num_layers=3), Recorder()
    assert module.model is not None
    gains = [read_gains(block) for block in module.model.blocks]  # type: ignore[arg-type]
    embedding = square(module.model.embedding.weight.detach())
    expected = predict(SCHEMES["prenorm"](3), gains, 12, embedding, 1 / 50)
    callbacks = [SignalPropagation(every_n_steps=2)]
    fit(tmp_path, module, *[tokens(4, 13)] * 2, callbacks=callbacks, logger=recorder, max_steps=2)
    for number, block in enumerate(expected, start=1):
        for figure in ("variance", "attn_ratio", "ffn_ratio"):
            predicted = recorder.series(f"signal/block_{number}/{figure}_theory")
            assert predicted == pytest.approx([getattr(block, figure)] * 2), "of initialization, in step 2 as well"
        assert recorder.series(f"signal/block_{number}/variance")[0] == pytest.approx(block.variance, rel=0.3)


def test_the_prediction_outlives_the_process(tmp_path: Path) -> None:
    first, second = SignalPropagation(), SignalPropagation()
    fit(tmp_path, make_module(), tokens(2, 9), callbacks=[first], logger=False, max_steps=1)
    second.load_state_dict(first.state_dict())
    assert second.constants(2) == first.constants(2) != {}


def test_where_there_is_no_theory_nothing_is_predicted(tmp_path: Path) -> None:
    recorder, callback = Recorder(), SignalPropagation()
    fit(tmp_path, make_module(ffn="moe"), tokens(2, 9), callbacks=[callback], logger=recorder, max_steps=1)
    assert recorder.series("signal/block_1/variance") != []
    assert recorder.series("signal/block_1/variance_theory") == []


@pytest.mark.parametrize("placement", ["spannorm", "siamesenorm"])
def test_training_does_not_notice(tmp_path: Path, placement: str) -> None:
    """The router's jitter draws random numbers in training, and would draw others after a sample that drew some."""

    def train(*callbacks: BlockMonitor) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = make_module(ffn="moe", placement=placement, moe={"jitter": 0.3})
        fit(tmp_path, module, *batches, callbacks=list(callbacks), logger=False, max_steps=3)
        assert module.training
        assert not any(part._forward_hooks for part in module.modules())
        return module.state_dict()

    batches = [tokens(2, 9) for _ in range(3)]
    watched = train(SignalPropagation(every_n_steps=1), RepresentationCollapse(every_n_steps=1))
    torch.testing.assert_close(watched, train(), atol=0, rtol=0)


def test_monitors_of_the_same_sample_share_one_forward_pass(tmp_path: Path) -> None:
    """In the first and last of three steps all three are due, two of them of the same positions; else only one is."""

    def train(*callbacks: BlockMonitor) -> tuple[Recorder, int]:
        torch.manual_seed(0)
        module, recorder, passes = make_module(), Recorder(), []
        assert module.model is not None
        module.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        fit(tmp_path, module, *batches, callbacks=list(callbacks), logger=recorder, max_steps=3)
        return recorder, passes.count(False)

    batches = [tokens(2, 9) for _ in range(3)]
    short = SignalPropagation(every_n_steps=9, positions=4)
    alone = [train(SignalPropagation(every_n_steps=1)), train(RepresentationCollapse(every_n_steps=9)), train(short)]
    assert [passes for _, passes in alone] == [3, 2, 2]
    both, passes = train(SignalPropagation(every_n_steps=1), RepresentationCollapse(every_n_steps=9))
    assert passes == 3
    for recorder, key in (
        (alone[0][0], "signal/block_2/kurtosis"),
        (alone[1][0], "representation/block_2/token_cosine"),
    ):
        assert both.series(key) == recorder.series(key) != []
    assert train(RepresentationCollapse(every_n_steps=9), short)[1] == 4


@pytest.mark.parametrize(("field", "value"), [("every_n_steps", 0), ("sequences", 0), ("positions", 1)])
@pytest.mark.parametrize("monitor", [SignalPropagation, RepresentationCollapse])
def test_a_sample_of_nothing_is_refused(monitor: type[BlockMonitor], field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"callbacks\.{monitor.name}\.{field}={value} is not valid"):
        monitor(**{field: value})
