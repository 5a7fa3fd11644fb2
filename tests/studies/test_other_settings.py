"""What a study makes of folders and records that are not of the run that is planned now, or not of all its steps."""

import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import lightning as L
import pytest

from studies import record
from studies import run as study_run
from studies.grid import Planned
from studies.plan import was_begun_as
from studies.record import COLLAPSED, FINISHED, SHORT, SLOW, Record, collect
from studies.run import put_aside, settings_of, train
from studies.warm import Ended
from tests.support.runs import run as train_once

PLANNED = Planned("prenorm_0.001_seed0", {"model.placement": "prenorm"}, 0, ("optim.lr=1e-3", "trainer.max_steps=50"))
OTHER = replace(PLANNED, overrides=("optim.lr=4e-3", "trainer.max_steps=600"))


class Enough(L.Callback):
    """As EarlyStopping: ends the run after its first step."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        trainer.should_stop = True


def begin(folder: Path, planned: Planned, *more: str) -> None:
    folder.mkdir()
    given = [*settings_of(planned), f"run_dir='{folder}'", *more]
    (folder / "overrides.yaml").write_text("".join(f"- {one}\n" for one in given))


def test_a_run_of_other_overrides_or_another_seed_is_not_the_one_that_is_planned(tmp_path: Path) -> None:
    begin(tmp_path / "run", PLANNED)
    assert was_begun_as(PLANNED, tmp_path / "run")
    assert not was_begun_as(OTHER, tmp_path / "run")
    assert not was_begun_as(replace(PLANNED, seed=1), tmp_path / "run")
    begin(tmp_path / "resumed", PLANNED, "ckpt_path=last")
    assert was_begun_as(PLANNED, tmp_path / "resumed")
    assert was_begun_as(PLANNED, tmp_path / "not there")
    (tmp_path / "of nobody").mkdir()
    assert was_begun_as(PLANNED, tmp_path / "of nobody")
    (tmp_path / "of nobody/summary.json").write_text("{}")
    assert not was_begun_as(PLANNED, tmp_path / "of nobody")


def test_what_lay_there_is_kept_and_the_run_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, path = tmp_path / PLANNED.name, tmp_path / f"{PLANNED.name}.json"
    for number in (1, 2):
        begin(folder, OTHER)
        (folder / "summary.json").write_text(json.dumps({"val_loss": float(number)}))
        path.write_text(f"of attempt {number}")
        put_aside(PLANNED, folder, path)
        assert not folder.exists()
        assert not path.exists()
        kept = tmp_path / f"{PLANNED.name}.earlier{number}"
        assert json.loads((kept / "summary.json").read_text()) == {"val_loss": number}
        assert (tmp_path / f"{PLANNED.name}.earlier{number}.json").read_text() == f"of attempt {number}"
        assert f"what lay there is of other settings, and is kept as {kept}" in capsys.readouterr().out
    begin(folder, PLANNED)
    put_aside(PLANNED, folder, path)
    assert was_begun_as(PLANNED, folder)
    assert folder.exists()


def test_a_run_that_is_out_of_time_is_no_result_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    begin(folder, PLANNED)
    (folder / "summary.json").write_text('{"val_loss": 2.0}')
    (folder / "status.json").write_text('{"status": "timed_out", "step": 9, "max_steps": 50}')
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/last.ckpt").touch()
    warm = mock.Mock(**{"train.return_value": Ended(0, "", "")})
    monkeypatch.setattr(study_run, "warm_process", lambda threads: warm)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(study_run, "trainer_of", lambda run: None)
    with open(os.devnull) as lock:
        assert train(PLANNED, folder, 1, lock) == "out of time; start the study again and it goes on"
    assert warm.train.call_args.args[0][-1] == "ckpt_path=last"


@pytest.mark.parametrize("otherwise", [FINISHED, SLOW, COLLAPSED])
def test_a_run_that_a_callback_ends_early_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, otherwise: str
) -> None:
    """But where it has failed, it has failed: a run without hope is ended by a callback, too."""
    enough = f"+callbacks.enough._target_={__name__}.Enough"
    folder = train_once(tmp_path, "run", "trainer.max_steps=50", enough)
    monkeypatch.setattr(record, "judge", lambda *_: otherwise)
    found = collect(PLANNED, folder)
    assert found.status == (COLLAPSED if otherwise == COLLAPSED else SHORT)
    found.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json").status == found.status
