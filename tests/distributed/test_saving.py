"""What is written beside the training is there before the run says that it is done."""

import json
from pathlib import Path

from tests.distributed.processes import command_line, together
from tests.helpers_run import tiny_job

SLOW = "+callbacks.slow._target_=tests.distributed.faults.SlowRename"


def test_a_run_ends_when_all_its_checkpoints_have_their_names(tmp_path: Path) -> None:
    arguments = tiny_job("experiment=dense_spannorm", "trainer=fsdp", "trainer.devices=2", SLOW, "run_dir=run")
    for (finished,) in together(2, tmp_path, command_line, [arguments]):
        assert finished.code == 0, finished.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    # Written last of all, of what was there by then.
    found = {name: summary[f"{name}_checkpoint"] for name in ("best", "last")}
    assert found == {name: f"run/checkpoints/{name}.ckpt" for name in found}
