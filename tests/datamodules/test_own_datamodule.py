"""A user's own DataModule, in a file of their own, needs no change to the project."""

import json
import math
from pathlib import Path

from tests.support.runs import run_on, scalars, tiny_job, train

FILE = """
import numpy as np
from datamodules.stream_datamodule import StreamDataModule

class Dice:
    def __init__(self, sides):
        self.sides = sides

    def read(self, numbers):
        return {"tokens": np.stack([np.random.default_rng(number).integers(0, self.sides, 33) for number in numbers])}

class DiceData(StreamDataModule):
    num_val_samples = 100

    def __init__(self, seq_len: int, batch_size: int, val_batches: int, num_workers: int, seed: int, sides: int = 6):
        super().__init__(seq_len, batch_size, val_batches, num_workers, seed)
        self.sides = sides
        self.save_hyperparameters()

    @property
    def vocab_size(self):
        return self.sides

    def samples(self, split):
        return Dice(self.sides)
"""
MINE = ("~data.root", "~data.document_mask")


def test_it_plugs_in_from_the_working_folder_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "my_dice.py").write_text(FILE)
    mine = ["data._target_=my_dice.DiceData", "+data.sides=20", *MINE]
    folder = run_on(tmp_path, *mine)
    summary = json.loads((folder / "summary.json").read_text())
    assert abs(summary["val_loss"] - math.log(20)) < 1
    run_on(tmp_path, *mine, "trainer.max_steps=4", "ckpt_path=last")
    assert list(scalars(folder, "train/loss")) == [0, 1, 2, 3]


def test_its_arguments_are_checked_too(tmp_path: Path) -> None:
    (tmp_path / "my_dice_too.py").write_text(FILE)
    job = [argument for argument in tiny_job() if not argument.startswith("data.root=")]
    refused = train(tmp_path, *job, "data._target_=my_dice_too.DiceData", "+data.side=3", *MINE)
    assert refused.code == 2
    assert "data.side=3 is not valid: no such field" in refused.err
    assert "did you mean sides?" in refused.err
    assert not (tmp_path / "runs").exists()
