"""stream_mixing against loops over tokens in float64; it is silent where there is one stream."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from callbacks.monitors.signal_propagation import SignalPropagation
from callbacks.monitors.stream_mixing import StreamMixing
from tests.support.fitting import Recorder, fit
from tests.support.models import make_module, tokens
from tests.support.schemes import of_hc, of_mhc, rms

SEQUENCES, POSITIONS, N = 2, 7, 4


def entropy_rank(matrix: Any) -> float:
    share = np.linalg.svd(matrix, compute_uv=False)
    share = share[share > 0] / share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def by_hand(module: Any, batch: torch.Tensor, placement: str) -> dict[str, float]:
    """Every figure of every block, from the equations of the tests; tokens one by one."""
    model = copy.deepcopy(module.model).double()
    figures: dict[str, float] = {}
    seen: list[tuple[int, str, Any, torch.Tensor]] = []
    for number, block in enumerate(model.blocks, start=1):
        for name, mapping in zip(("attn", "ffn"), block.placement.mappings(), strict=True):
            mapping.register_forward_hook(
                lambda module, inputs, output, at=(number, name, block): seen.append((*at, inputs[0].detach()))
            )
    with torch.no_grad():
        model(batch)
    product = np.stack([np.eye(N)] * (SEQUENCES * POSITIONS))
    for number, name, block, streams in seen:
        parameters = dict(block.placement.named_parameters())
        at: Any = type("At", (), {"P": {key: value.detach() for key, value in parameters.items()}})
        key = f"block_{number}/{name}"
        if placement == "gr":
            p = {k.split(".")[-1]: v for k, v in at.P.items() if k.startswith(f"map_{name}.") and "norms" not in k}
            gains = torch.stack([at.P[f"map_{name}.norms.{i}.weight"] for i in range(N)])
            hat = streams / rms(streams) * gains
            inner = hat.flatten(1) @ p["down"].T / N
            gates = ((inner * inner.sigmoid()) @ p["up"].T).sigmoid().view_as(hat)
            sizes, post, res = gates.mean(-1), 2 * (hat.flatten(1) @ p["weigh"].T / N).sigmoid(), None
            figures[f"{key}_gate"] = float(gates.mean())
        else:
            pre, post, res = (of_hc if placement == "hc" else of_mhc)(at, f"map_{name}", streams)
            sizes = pre.abs() * streams.square().mean(-1).sqrt()
            res = None if placement == "ihc" else res
        figures[f"{key}_write"] = float(post.mean())
        for stream in range(N):
            shares = [float(row[stream] / row.sum()) for row in sizes]
            figures[f"{key}_share_{stream + 1}"] = float(np.mean(shares))
        if res is None:
            continue
        product = np.stack([new.numpy() @ old for new, old in zip(res, product, strict=True)])
        figures[f"block_{number}/gain_forward"] = float(np.mean([abs(p).sum(1).max() for p in product]))
        figures[f"block_{number}/gain_backward"] = float(np.mean([abs(p).sum(0).max() for p in product]))
        figures[f"block_{number}/mapping_rank"] = float(np.mean([entropy_rank(p) for p in product]))
    return figures


@pytest.mark.parametrize("placement", ["hc", "mhc", "ihc", "gr"])
def test_figures_are_those_of_loops(tmp_path: Path, placement: str) -> None:
    module, recorder = make_module(placement=placement), Recorder()
    for name, parameter in module.named_parameters():
        if "placement.map_" in name and "norms" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    batch = tokens(3, 12)
    expected = by_hand(module, batch[:SEQUENCES, :POSITIONS], placement)
    callback = StreamMixing(sequences=SEQUENCES, positions=POSITIONS)
    fit(tmp_path, module, batch, callbacks=[callback], logger=recorder, max_steps=1)
    found = {key: record[key] for record in recorder.records for key in record if key.startswith("streams/")}
    assert found.keys() == {f"streams/{key}" for key in expected}
    for key, value in expected.items():
        assert found[f"streams/{key}"] == pytest.approx(value, rel=1e-3), key
    if placement == "mhc":  # its rows sum to 1, and so do their product's
        assert found["streams/block_2/gain_forward"] == pytest.approx(1.0, abs=1e-4)
        assert found["streams/block_2/gain_backward"] < 1.2
    if placement == "hc":
        assert found["streams/block_2/gain_forward"] > 2


def test_it_is_silent_and_costs_no_pass_where_there_is_one_stream(tmp_path: Path) -> None:
    module, recorder, passes = make_module(placement="siamesenorm"), Recorder(), []
    assert module.model is not None
    module.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    callback = StreamMixing(every_n_steps=1)
    fit(tmp_path, module, *[tokens(2, 9)] * 2, callbacks=[callback], logger=recorder, max_steps=2)
    assert passes == [True, True]
    assert not [key for record in recorder.records for key in record if key.startswith("streams/")]
    assert callback.charts(module) == {}


def test_training_does_not_notice_and_the_sample_is_shared(tmp_path: Path) -> None:
    def train(*callbacks: Any) -> tuple[dict[str, torch.Tensor], int]:
        torch.manual_seed(0)
        module, passes = make_module(placement="mhc"), []
        assert module.model is not None
        module.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        fit(tmp_path, module, *batches, callbacks=list(callbacks), logger=False, max_steps=2)
        assert not any(part._forward_hooks for part in module.model.blocks.modules())
        return module.state_dict(), passes.count(False)

    batches = [tokens(2, 9) for _ in range(2)]
    watched, passes = train(StreamMixing(every_n_steps=1), SignalPropagation(every_n_steps=1))
    torch.testing.assert_close(watched, train()[0], atol=0, rtol=0)
    assert passes == 2


def test_every_figure_has_a_chart() -> None:
    import re

    callback, module = StreamMixing(), make_module(placement="hc")
    patterns = callback.charts(module)["streams"].values()
    for figure in (
        "attn_share_1",
        "ffn_share_4",
        "attn_write",
        "gain_forward",
        "gain_backward",
        "mapping_rank",
        "ffn_gate",
    ):
        assert sum(re.search(pattern, f"streams/block_3/{figure}") is not None for pattern in patterns) == 1, figure
