"""The monitors' benchmark on a tiny job: its figures, and that it measures what a run has by default."""

import math
import re
from pathlib import Path

import lightning as L
import pytest
import yaml
from hydra.utils import get_class

from benchmarks import monitoring
from tests.support.runs import ROOT, tiny_job

GROUPS = ("monitors", "divergence", "checkpointing", "console")
FILES = [yaml.safe_load((ROOT / f"configs/callbacks/{group}.yaml").read_text()) for group in GROUPS]
DEFAULT = {name: fields for file in FILES for name, fields in file.items()}
NO_MONITORS = {"StepProgress", "RunStatus", "SlowSteps", "LastCheckpoint", "BestCheckpoint", "RandomState"}


def test_it_runs_and_writes_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "monitoring.md"
    monkeypatch.setattr(monitoring, "RUN", str(tmp_path / "run"))
    monitoring.main([*tiny_job(), "rounds=3", f"output={output}"])
    text = output.read_text()
    for name in ("a step without monitors", "inside of the monitors", "for one sample", "estimate of the curvature"):
        # A difference of times on a busy machine may be less than nothing.
        (figure,) = re.findall(rf"\| .*{name}.* \| (-?[\d.]+) \|", text)
        assert math.isfinite(float(figure)), name
    assert len(re.findall(r"\*\*-?[\d.]+ %\*\*", text)) == 2


def test_it_measures_what_a_run_has_by_default() -> None:
    measured = {type(monitor).__name__ for monitor in monitoring.Turns().monitors}
    classes = [get_class(fields["_target_"]) for fields in DEFAULT.values()]
    hooked = {c.__name__ for c in classes if any(getattr(c, h) is not getattr(L.Callback, h) for h in monitoring.HOOKS)}
    assert hooked - NO_MONITORS == measured - {"Curvature"}
    sampled = {fields["every_n_steps"] for fields in DEFAULT.values() if "every_n_steps" in fields}
    assert sampled == {monitoring.SAMPLED_EVERY}
