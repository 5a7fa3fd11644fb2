"""How far gates are open: against norms called by hand; absent where there are none."""

from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.monitors.gate_means import GateMeans
from spannorm import GatedNorm
from tests.support.fitting import Recorder, fit
from tests.support.models import make_module, tokens


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_every_gated_norm_is_there_with_its_mean(tmp_path: Path, ffn: str) -> None:
    module, recorder, seen = make_module(norm="gatednorm", placement="subln", ffn=ffn), Recorder(), dict[str, Any]()
    assert module.model is not None
    for name, norm in module.model.named_modules():
        if isinstance(norm, GatedNorm):
            torch.nn.init.normal_(norm.up)
            norm.norm.register_forward_hook(
                lambda _, inputs, y, name=name: seen.setdefault(name, []).append(y.detach().double())
            )
    batch = tokens(3, 12)
    callback = GateMeans(sequences=2, positions=7)
    weights = {name: norm for name, norm in module.model.named_modules() if isinstance(norm, GatedNorm)}
    with torch.no_grad():
        module.model(batch[:2, :7])
        expected = {}
        for name, outputs in seen.items():
            down, up = weights[name].down.double(), weights[name].up.double()
            y = torch.cat([output.flatten(0, -2) for output in outputs])
            expected[name] = torch.sigmoid(torch.nn.functional.silu(y @ down.T) @ up.T).mean().item()
    fit(tmp_path, module, batch, callbacks=[callback], logger=recorder, max_steps=1)
    logged = {key: value for record in recorder.records for key, value in record.items() if key.startswith("gates/")}
    assert logged == {
        f"gates/block_{int(name.split('.')[1]) + 1}/{name.split('.', 2)[2]}": pytest.approx(value, rel=1e-4)
        for name, value in expected.items()
    }
    assert len(logged) == 2 * 4 + 1  # around and inside attention and FFN, and the final one


def test_a_model_without_gates_is_not_looked_at(tmp_path: Path) -> None:
    module, recorder, passes = make_module(placement="rezero"), Recorder(), []  # its gate is a number, and no part
    assert module.model is not None
    module.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    fit(tmp_path, module, tokens(2, 9), callbacks=[GateMeans()], logger=recorder, max_steps=1)
    assert passes == [True]
    assert GateMeans().charts(module) == {}
