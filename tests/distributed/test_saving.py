"""What is written beside the training is there before the run says that it is done."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from tests.support.processes import command_line, together
from tests.support.runs import tiny_job

LAST = Path("run/checkpoints/last.ckpt")
SLOW = "+callbacks.slow._target_=tests.support.rank_faults.SlowRename"


class Look(L.Callback):
    """Notes in the step after the first save whether that checkpoint has its name."""

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero and trainer.global_step == 1:
            Path("looked").write_text(str(LAST.exists()))


def test_a_run_ends_when_all_its_checkpoints_have_their_names(tmp_path: Path) -> None:
    arguments = tiny_job("experiment=dense_spannorm", "trainer=fsdp", "trainer.devices=2", SLOW, "run_dir=run")
    for (finished,) in together(2, tmp_path, command_line, [arguments]):
        assert finished.code == 0, finished.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    # Written last of all, of what was there by then.
    found = {name: summary[f"{name}_checkpoint"] for name in ("best", "last")}
    assert found == {name: f"run/checkpoints/{name}.ckpt" for name in found}


@pytest.mark.slow
def test_training_waits_where_it_is_told_to(tmp_path: Path) -> None:
    options = ["trainer.strategy.asynchronous=false", "callbacks.last_checkpoint.every_n_train_steps=1"]
    look = "+callbacks.look._target_=tests.distributed.test_saving.Look"
    two = ["experiment=dense_spannorm", "trainer=fsdp", "trainer.devices=2", SLOW, "run_dir=run"]
    for (finished,) in together(2, tmp_path, command_line, [tiny_job(*two, *options, look)]):
        assert finished.code == 0, finished.err
    assert (tmp_path / "looked").read_text() == "True"
