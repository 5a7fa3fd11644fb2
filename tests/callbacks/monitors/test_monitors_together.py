"""All monitors at once: one transfer a logged step, and the same keys and values with and without torch.compile."""

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from callbacks.divergence.divergence import Divergence
from callbacks.divergence.flight_recorder import FlightRecorder
from callbacks.monitors.gradient_health import GradientHealth
from callbacks.monitors.representation_collapse import RepresentationCollapse
from callbacks.monitors.signal_propagation import SignalPropagation
from callbacks.monitors.throughput import Throughput
from tests.support.fitting import Recorder, fit
from tests.support.models import make_module, tokens

STEPS = 4
TO_THE_HOST = ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__")
BY_THE_CLOCK = {"train/tokens_per_second", "train/images_per_second", "train/data_wait_share", "train/memory_peak"}


def sampled() -> list[Any]:
    """What is sampled in every second step, as it is logged."""
    return [GradientHealth(), SignalPropagation(2), RepresentationCollapse(2)]


def watching(root: Path) -> list[Any]:
    """What reads every step."""
    return [FlightRecorder(str(root)), Divergence(str(root))]


def monitors(root: Path) -> list[Any]:
    """Everything."""
    return [Throughput(), *sampled(), *watching(root)]


def records(root: Path, callbacks: list[Any], **fields: Any) -> list[dict[str, float]]:
    torch.manual_seed(0)
    module, recorder = make_module(optim={"lr": 1e-3}, **fields), Recorder()
    batches = [tokens(4, 17) for _ in range(2 * STEPS)]
    options = {"max_steps": STEPS, "accumulate_grad_batches": 2, "log_every_n_steps": 2}
    fit(root, module, *batches, callbacks=callbacks, logger=recorder, **options)
    return recorder.records


def transfers(root: Path, callbacks: list[Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a run turns a tensor into something that Python can read."""
    count = 0

    def counting(method: Any) -> Any:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            return method(*arguments, **keywords)

        return counted

    with monkeypatch.context() as patch:
        for name in TO_THE_HOST:
            patch.setattr(Tensor, name, counting(getattr(Tensor, name)))
        # Experts in a loop read their number of tokens in every forward pass, and a prediction reads the first weights.
        records(root, callbacks, ffn="dense", placement="sandwich")
    return count


def test_all_monitors_together_wait_for_the_device_once_a_logged_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 (sampled), 2 and 4 (logged and sampled). Throughput is left out: what it logs, Lightning reads."""
    without = transfers(tmp_path, [], monkeypatch)
    assert transfers(tmp_path, sampled(), monkeypatch) - without == 3


def test_what_reads_every_step_waits_once_a_step_and_no_more_on_logged_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All share the transfer of callbacks/statistics.py."""
    without = transfers(tmp_path, [], monkeypatch)
    assert transfers(tmp_path, watching(tmp_path), monkeypatch) - without == STEPS
    assert transfers(tmp_path, [*sampled(), *watching(tmp_path)], monkeypatch) - without == STEPS


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch looks at it while it traces
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own inductor still imports it
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_compiled_blocks_have_the_same_keys_and_values(
    tmp_path: Path, ffn: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    plain, compiled = (records(tmp_path, monitors(tmp_path), ffn=ffn, compile=on) for on in (False, True))
    assert len(plain) == len(compiled)
    keys = [set(record) for record in plain]
    assert [set(record) for record in compiled] == keys
    assert {"signal/block_2/attn_entropy", "representation/block_1/effective_rank"} < set().union(*keys)
    for expected, found in zip(plain, compiled, strict=True):
        for key in expected.keys() - BY_THE_CLOCK:
            if "step_seconds" not in key:
                assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), key
