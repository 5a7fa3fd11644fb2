"""The check of a GPU, dry: every item at toy size; and that it stops at nothing."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import ConfigError, UserError
from tools import check_gpu, gpu_items
from tools.check_gpu import report
from tools.gpu_items import ITEMS, ROOT, Finding, Place, look_at


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_item_works_at_toy_size(tmp_path: Path) -> None:
    output = tmp_path / "dry.md"
    check_gpu.main(["device=cpu", f"output={output}", "minutes=20"])  # exits with 1 where something did not hold
    text = output.read_text()
    assert text.count("| held |") >= 12
    assert "not held" not in text
    assert "not reached" not in text


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
    late, dead = ("sleep 60", 0.2, "no time was left"), ("echo oh >&2; exit 9", 10, "exit code 9: oh")
    for script, seconds, figure in (late, dead):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        assert check_gpu.look("sharded", "cpu", tmp_path, seconds) == [Finding("sharded", False, figure)]


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
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, tmp_path)
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f'#!/bin/sh\necho "$*" >> {log}\ncase "$*" in *check_gpu*) exit 3;; esac\nexit 1\n')
    python.chmod(0o755)
    ended = subprocess.run([tmp_path / "tools/check_gpu.sh", python, "device=cpu"], capture_output=True, text=True)
    calls = log.read_text().splitlines()
    assert (ended.returncode, calls[-1]) == (3, "-m tools.check_gpu device=cpu")
    assert calls[0] == "-m venv --system-site-packages .venv-gpu"
    asked = [call.split()[-1] for call in calls if " pip install " in call]
    assert any(package.startswith("torch==") for package in asked)
    assert any(package.startswith("transformers==") for package in asked), "one by one, where all together fail"
