"""Sweeps go on past runs that fail, say at the end which did, and hand a loss to sweepers that want one."""

import importlib.util
import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from hydra.experimental.callback import Callback

from core.sweep import NOTES, WORST_LOSS
from core.validation_loss import final_loss
from tests.support.runs import TRAIN, Finished, python, tiny_job, train


class At(L.Callback):
    """Something happens before the first step.

    Args:
        what: a bug, or a signal's name; none: nothing.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.what == "bug":
            raise RuntimeError("a bug\nof two lines")
        if self.what != "none" and trainer.global_step == 0:  # a second Ctrl-C would leave at once
            os.kill(os.getpid(), signal.Signals[self.what])


AT = "+callbacks.at={_target_: tests.test_sweeps.At, what: none}"


class Values(Callback):
    """Hydra's callback that sees what each run returns."""

    seen: list[Any]

    def on_job_end(self, config: Any, job_return: Any, **_: Any) -> None:
        Values.seen.append(job_return.return_value)


VALUES = "+hydra.callbacks.values._target_=tests.test_sweeps.Values"


def summary(finished: Finished) -> list[str]:
    """The lines at the end that say what failed."""
    lines = finished.err.splitlines()
    first = next(n for n, line in enumerate(lines) if re.fullmatch(r"\d+ of \d+ runs of the sweep failed:", line))
    return lines[first:]


def folders(cwd: Path) -> list[str]:
    return sorted(path.name for path in (cwd / "runs/default").iterdir())


class FullDisk(Callback):
    """Hydra's callback that takes the sweep's notes away before its first run, as a full or lost disk would."""

    def on_job_start(self, config: Any, **_: Any) -> None:
        notes = Path(os.environ[NOTES])
        for number in range(3):
            (notes / f"{number}.new").mkdir(exist_ok=True)


def test_notes_that_cannot_be_written_do_not_end_the_sweep(tmp_path: Path) -> None:
    disk = "+hydra.callbacks.disk._target_=tests.test_sweeps.FullDisk"
    swept = train(tmp_path, "-m", *tiny_job("model.num_heads=2,3,4", disk))
    assert swept.code == 2
    assert "The sweep cannot note how its runs end: [Errno 21] Is a directory" in swept.err
    assert summary(swept)[0] == "1 of 3 runs of the sweep failed:"
    assert summary(swept)[1].startswith("  1  model.num_heads=3: model.")
    assert len(folders(tmp_path)) == 2


def test_a_path_that_the_file_system_refuses_is_a_line_in_a_sweep_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    swept = train(tmp_path, "-m", *tiny_job("logger=csv", f"logger.csv.save_dir={tmp_path},{tmp_path}/file/logs"))
    assert swept.code == 2
    assert "Traceback" not in swept.err
    assert summary(swept)[0] == "1 of 2 runs of the sweep failed:"
    assert "logger.csv.save_dir=" in summary(swept)[1]
    assert len(folders(tmp_path)) == 1


def test_a_refused_run_does_not_end_the_sweep(tmp_path: Path) -> None:
    Values.seen = []
    swept = train(tmp_path, "-m", *tiny_job("model.num_heads=2,3,4", VALUES))
    assert swept.code == 2
    assert summary(swept)[0] == "1 of 3 runs of the sweep failed:"
    assert summary(swept)[1].startswith("  1  model.num_heads=3: model.")
    assert len(summary(swept)) == 2
    first, last = folders(tmp_path)
    assert "_num-heads-2" in first
    assert "_num-heads-4" in last
    losses = [
        json.loads((tmp_path / f"runs/default/{name}/summary.json").read_text())["val_loss"] for name in (first, last)
    ]
    assert Values.seen == [pytest.approx(losses[0]), WORST_LOSS, pytest.approx(losses[1])]
    assert not list(tmp_path.rglob(".notes-*"))


def test_neither_does_one_that_diverges_nor_one_that_crashes(tmp_path: Path) -> None:
    """Whose exit code is the first failed run's."""
    stop = ["callbacks.divergence.policy=stop", "trainer.max_steps=12", "trainer.val_check_interval=20"]
    Values.seen = []
    swept = train(tmp_path, "-m", *tiny_job(AT, "callbacks.at.what=none,bug", "optim.lr=1e30,1e-3", *stop, VALUES))
    assert swept.code == 3
    diverged, *crashed = summary(swept)[1:]
    assert diverged.startswith("  0  callbacks.at.what=none optim.lr=1e+30: diverged: step ")
    assert crashed == [
        f"  {number}  callbacks.at.what=bug optim.lr={lr}: RuntimeError: a bug of two lines"
        for number, lr in ((2, "1e+30"), (3, "0.001"))
    ]
    assert "Traceback" in swept.err, "a fault of the project keeps it"
    assert Values.seen[0] == Values.seen[2] == Values.seen[3] == WORST_LOSS
    assert 0 < Values.seen[1] < 10


@pytest.mark.slow
def test_a_signal_ends_the_sweep(tmp_path: Path) -> None:
    swept = train(tmp_path, "-m", *tiny_job(AT, "callbacks.at.what=bug,SIGINT,none"))
    assert swept.code == 130
    assert len(folders(tmp_path)) == 2, "the third never began"
    assert "go on with" in swept.out
    assert summary(swept)[1:] == [
        "  0  callbacks.at.what=bug: RuntimeError: a bug of two lines",
        "  1  callbacks.at.what=SIGINT: it did not end",
    ]
    assert not list(tmp_path.rglob(".notes-*"))


def test_what_cannot_even_be_composed_is_refused_before_anything_runs(tmp_path: Path) -> None:
    refused = train(tmp_path, "-m", *tiny_job("model.dim=32,wide"))
    assert refused.code == 2
    assert re.fullmatch(r"Error: model\.dim='.*wide' is not valid: expected an integer\n", refused.err)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_sweep_in_which_all_goes_well_says_nothing(tmp_path: Path) -> None:
    swept = train(tmp_path, "-m", *tiny_job("seed=0,1"))
    assert swept.code == 0
    assert "failed" not in swept.err
    assert len(folders(tmp_path)) == 2
    assert (next((tmp_path / "runs/sweeps").iterdir()) / "multirun.yaml").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = train(tmp_path, "-m", *tiny_job("seed=0,1", "hydra.sweep.dir=file/sweep"))
    assert refused.code == 2
    assert refused.err == (
        f"Error: hydra.sweep.dir='{tmp_path}/file/sweep' is not valid: "
        "expected a folder that can be written to (Not a directory)\n"
    )


class Ended:
    """What is left of a Trainer."""

    def __init__(self, **metrics: float) -> None:
        self.callback_metrics = {name.replace("_", "/"): value for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("metrics", "noted", "expected"),
    [
        ({"val_loss": 1.5}, 2.5, 1.5),
        ({"val_loss": math.nan}, None, WORST_LOSS),
        ({"val_loss": math.inf}, None, WORST_LOSS),
        ({"val_loss": 1e30}, None, WORST_LOSS),
        ({}, 2.5, 2.5),  # a finished run that is resumed trains nothing
        ({}, None, WORST_LOSS),
    ],
)
def test_a_sweeper_gets_a_finite_number(
    metrics: dict[str, float], noted: float | None, expected: float, tmp_path: Path
) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"val_loss": noted}))
    trainer: Any = Ended(**metrics)
    assert final_loss(trainer, tmp_path) == expected


@pytest.mark.slow
def test_the_runs_of_several_processes_likewise(tmp_path: Path) -> None:
    parallel = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    bad = ["model.num_heads=2,3,4", AT, "callbacks.at.what=none,bug"]
    swept = python(tmp_path, str(TRAIN), "-m", *tiny_job(*parallel, *bad))
    assert swept.code == 1
    assert [line.split(":")[0] for line in summary(swept)] == [
        "4 of 6 runs of the sweep failed",
        "  1  model.num_heads=2 callbacks.at.what=bug",
        "  2  model.num_heads=3 callbacks.at.what=none",
        "  3  model.num_heads=3 callbacks.at.what=bug",
        "  5  model.num_heads=4 callbacks.at.what=bug",
    ]
    assert len([name for name in folders(tmp_path) if "what-none" in name]) == 2


@pytest.mark.slow
def test_a_killed_process_ends_the_sweep_in_words(tmp_path: Path) -> None:
    """As the kernel does when memory runs out: joblib then takes down the others too."""
    parallel = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    swept = python(tmp_path, str(TRAIN), "-m", *tiny_job(*parallel, AT, "callbacks.at.what=SIGKILL,none"))
    assert swept.code == 1
    assert "Error: the sweep ends, as one of its processes was killed: " in swept.err
    assert "  0  callbacks.at.what=SIGKILL: it did not end" in summary(swept)
    assert "Traceback" not in swept.err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="requirements-sweeps.txt")
def test_optuna_minimizes_the_validation_loss(tmp_path: Path) -> None:
    """docs/studies.md's example: lr of 1e30 diverges, and the study goes on to better ones."""
    search = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=6",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=1",
    ]
    space = ["optim.lr=choice(1e30,1e-3,1e-2)", "model.num_heads=choice(2,3)"]
    stop = ["callbacks.divergence.policy=stop", "trainer.max_steps=12", "trainer.val_check_interval=20"]
    swept = python(tmp_path, str(TRAIN), "-m", *tiny_job(*search, *space, *stop))
    assert swept.code in (2, 3), swept.err
    (results,) = (tmp_path / "runs/sweeps").glob("*/optimization_results.yaml")
    best = yaml.safe_load(results.read_text())
    assert best["best_params"]["optim.lr"] in (1e-3, 1e-2)
    losses = [json.loads(path.read_text())["val_loss"] for path in (tmp_path / "runs/default").glob("*/summary.json")]
    assert best["best_value"] == pytest.approx(min(losses))
    assert all("_lr-" in name and "num-heads-" in name for name in folders(tmp_path))
