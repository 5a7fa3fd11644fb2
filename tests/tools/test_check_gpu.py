"""The check of a GPU, dry: every item at toy size; and that it stops at nothing."""

import json
import re
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from core.errors import ConfigError, UserError
from lightning_modules.layers import document_mask
from tools import check_gpu, gpu_items
from tools.check_gpu import report
from tools.gpu_items import ITEMS, ROOT, UNWATCHED, Finding, Place, look_at

WITHOUT_A_GOAL = {
    "backend of the experts": r"MoE backend: loop \(runs on cpu\)",
    "first step, compilation included": r"[\d.]+ s, median step [\d.]+ s",
    "peak of memory against the plan": r"[\d.]+ of [\d.]+ GiB",
    "tokens per second": r"[\d,]+",
    "MFU, main job": "none: no peak of this device is known",
    "experts without tokens: megablocks": "needs a CUDA device; docs/megablocks.md says how to install it",
    "document mask, compiled": "FlexAttention has no backward pass on a CPU",
    "waits for the device in 7 steps, no callbacks": "not counted on a CPU",
    "waits for the device in 7 steps, the default ones": "not counted on a CPU",
    "1B dense at 4096": r"[\d,]+ tokens/s, peak [\d.]+ GiB",
    "MFU, 1B dense": "none: no peak of this device is known",
}
"""Of a dry run; all else holds, or does not."""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_item_works_at_toy_size(tmp_path: Path) -> None:
    output = tmp_path / "dry.md"
    check_gpu.main(["device=cpu", f"output={output}", "minutes=20"])  # exits with 1 where something did not hold
    text = output.read_text()
    found = dict(re.findall(r"^\| ([^|]+) \| - \| (.*) \|$", text, re.MULTILINE))
    assert found.keys() == WITHOUT_A_GOAL.keys()
    assert [name for name, figure in WITHOUT_A_GOAL.items() if not re.fullmatch(figure, found[name])] == []
    assert text.count("| held |") == 16
    assert "**not held**" not in text


def test_an_error_is_a_finding_and_so_is_what_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(place: Place) -> Iterator[Finding]:
        yield Finding("first", True, place.device)
        raise RuntimeError("CUDA error:\nan illegal memory access")

    monkeypatch.setitem(ITEMS, "broken", broken)
    look_at("broken", Place("cuda", tmp_path), tmp_path / "found")
    found = [Finding(*json.loads(line)) for line in (tmp_path / "found").read_text().splitlines()]
    wrong = Finding("broken", False, "RuntimeError: CUDA error: an illegal memory access")
    assert found == [Finding("first", True, "cuda"), wrong]


def test_a_process_that_takes_too_long_or_dies_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    monkeypatch.setattr(check_gpu.sys, "executable", str(python))
    late, dead = ("sleep 60", 0.2, "ended after 0 s"), ("echo oh >&2; exit 9", 10, "exit code 9: oh")
    for script, seconds, figure in (late, dead):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        assert check_gpu.look("sharded", "cpu", tmp_path, seconds) == [Finding("sharded", False, figure)]


def test_nothing_of_an_item_outlives_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    plain = subprocess.Popen.wait

    def wait(process: Any, timeout: float | None = None) -> int:
        waited.append(process)
        if len(waited) == 1:
            raise KeyboardInterrupt
        return plain(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    (tmp_path / "python").write_text("#!/bin/sh\nsleep 60\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(check_gpu.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(KeyboardInterrupt):
        check_gpu.look("sharded", "cpu", tmp_path, 10)
    assert waited[0].returncode == -signal.SIGKILL


def test_an_item_gets_a_third_and_the_report_is_written_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where it is interrupted, it says what was not reached."""
    output = tmp_path / "out.md"
    looked: list[str] = []

    def look(name: str, device: str, folder: Path, seconds: float) -> list[Finding]:
        assert 159 < seconds <= 160
        assert all(f"| {before} | held |" in output.read_text() for before in looked)
        if len(looked) == 2:
            raise KeyboardInterrupt
        looked.append(name)
        return [Finding(name, True, "")]

    monkeypatch.setattr(check_gpu, "look", look)
    with pytest.raises(KeyboardInterrupt):
        check_gpu.main(["device=cpu", f"output={output}"])
    text = output.read_text()
    assert "| empty_experts | **not held** | interrupted |" in text
    assert text.count("| - | not reached: interrupted |") == len(ITEMS) - 3
    assert f"Written: {output}" in capsys.readouterr().out


def test_without_torch_there_is_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_gpu, "look", lambda *_: [])
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit):
        check_gpu.main([f"output={tmp_path / 'out.md'}"])
    assert "| torch | **not held** | import of torch halted" in (tmp_path / "out.md").read_text()


def test_a_gradient_that_is_no_number_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it stands; and cuDNN's fault is looked for where it was, far below the least exponential."""
    plain, lowest = document_mask.attend, []

    def attend(q: Any, k: Any, v: Any, mask: Any, grouped: bool) -> Any:
        logits = (q.float() @ k.float().mT / 8).masked_fill(~mask, -torch.inf)
        lowest.append(float(logits.detach().logsumexp(-1).min()))
        if q.dtype == torch.bfloat16 and broken:
            q.register_hook(lambda gradient: gradient * torch.nan)
        return plain(q, k, v, mask, grouped)

    monkeypatch.setattr(document_mask, "attend", attend)
    for broken in (False, True):
        found = list(gpu_items.document_masks(Place("cpu", tmp_path)))
        assert [finding.held for finding in found] == [None, not broken, not broken]
    assert lowest[2] < -88.7


def test_a_run_that_is_measured_is_not_watched(tmp_path: Path) -> None:
    """A plan leaves out what monitors keep, and an interval that an item gives counts."""
    monitors = yaml.safe_load((ROOT / "configs/callbacks/monitors.yaml").read_text())
    assert {"throughput"} == monitors.keys() - {text.removeprefix("callbacks.")[:-5] for text in UNWATCHED}
    given = Place("cuda", tmp_path).overrides("x", "trainer.log_every_n_steps=5")
    assert [text for text in given if "log_every" in text][-1] == "trainer.log_every_n_steps=5"


@pytest.mark.parametrize(("values", "held"), [([], False), ([0.9, 0.4, 0.4], True), ([0.4, 1.2, 1.2], False)])
def test_no_mfu_is_a_finding_and_so_is_one_that_cannot_be(values: list[float], held: bool, tmp_path: Path) -> None:
    run = SimpleNamespace(curve=lambda name: (list(range(len(values))), values))
    assert gpu_items._mfu("x", run, Place("cuda", tmp_path)).held == held
    assert gpu_items._mfu("x", run, Place("cpu", tmp_path)).held == (held if values else None)


def test_what_has_no_time_left_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.md"
    check_gpu.main(["device=cpu", "minutes=0.01", f"output={output}"])
    assert output.read_text().count("| - | not reached: no time was left |") == len(ITEMS)
    assert "not reached" in capsys.readouterr().out


def test_the_report_has_a_table_and_longer_figures_below() -> None:
    found = [Finding("a", True, "1 | 2"), Finding("b", False, "x"), Finding("c", None, "\n# Title\n\n| long |\n")]
    text = report(found, "NVIDIA H200", 61.2)
    assert "| a | held | 1 / 2 |\n| b | **not held** | x |\n| c | - | below |\n\n## c\n\n# Title" in text
    assert text.startswith("# NVIDIA H200\n\n`make check-gpu`, 61 s.")


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="no CUDA device is here: device=cpu makes a dry run"):
        check_gpu.main([])
    with pytest.raises(ConfigError, match=r"only='main_jbo' is not valid: .*mean main_job"):
        check_gpu.main(["only=main_jbo"])


def test_a_gpu_gets_full_sizes_and_the_dry_run_toys(tmp_path: Path) -> None:
    full, toy = (Place(device, tmp_path).overrides("x", "model.dim=2048", toy=("a=1",)) for device in ("cuda", "cpu"))
    assert "trainer.accelerator=gpu" in full
    assert not set(full) & {*gpu_items.TOY, "a=1"}
    assert {*gpu_items.TOY, "a=1"} <= set(toy)


def test_what_cannot_be_installed_does_not_stop_it(tmp_path: Path) -> None:
    """Neither pip, nor a new environment, nor MegaBlocks: the check itself is started all the same."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/check_gpu.sh", tmp_path / "tools")
    for path in (ROOT / "Makefile", *ROOT.glob("requirements*.txt")):
        shutil.copy(path, tmp_path)
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f'#!/bin/sh\necho "$*" >> {log}\ncase "$*" in *check_gpu*) exit 3;; esac\nexit 1\n')
    python.chmod(0o755)
    ended = subprocess.run([tmp_path / "tools/check_gpu.sh", python, "device=cpu"], capture_output=True, text=True)
    calls = log.read_text().splitlines()
    assert (ended.returncode, calls[-1]) == (3, "-m tools.check_gpu minutes=8 device=cpu")
    assert calls[0] == "-m venv --system-site-packages .venv-gpu"
    asked = [call.split()[-1] for call in calls if " pip install " in call]
    assert any(package.startswith("torch==") for package in asked)
    alone = ("transformers==", "litgpt==", "torchtitan==", "psutil==", "x-transformers==", "pyarrow==")
    assert all(any(package.startswith(name) for package in asked) for name in alone), "one by one, where all fail"


@pytest.mark.slow
def test_it_has_the_torch_of_an_environment_that_python_is_of(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/check_gpu.sh", tmp_path / "tools")
    (tmp_path / "tools/check_gpu.py").write_text("import torch\nprint(torch.__file__)\n")
    (tmp_path / "requirements.txt").write_text("torch==2.13.0\n")
    venv.create(tmp_path / "outer", symlinks=True)
    (packages,) = (tmp_path / "outer").glob("lib/python*/site-packages")
    (packages / "torch.py").touch()
    # Without pip, which takes seconds: what it would bring is not of interest here.
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$2" != venv ] || set -- "$@" --without-pip\nexec {tmp_path}/outer/bin/python "$@"\n'
    )
    python.chmod(0o755)
    ended = subprocess.run([tmp_path / "tools/check_gpu.sh", python], capture_output=True, text=True)
    assert ended.stdout.strip() == str(packages / "torch.py"), ended.stderr
