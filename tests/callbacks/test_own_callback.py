"""A user's own callback, in a file of their own, needs no change to the project."""

from pathlib import Path

from tests.support.runs import tiny_job, train

FILE = """
import lightning as L

class Note(L.Callback):
    def __init__(self, path: str, text: str = "none") -> None:
        self.path, self.text = path, text

    def on_train_end(self, trainer, pl_module):
        with open(self.path, "w") as file:
            file.write(f"{self.text} {trainer.global_step} {len(pl_module.model.blocks)}")
"""


def test_it_plugs_in_from_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "notes_of_mine.py").write_text(FILE)
    mine = ["+callbacks.mine._target_=notes_of_mine.Note", "+callbacks.mine.path=note.txt", "+callbacks.mine.text=hi"]
    assert train(tmp_path, *tiny_job("run_dir=run"), *mine).code == 0
    assert (tmp_path / "note.txt").read_text() == "hi 2 2"


def test_its_arguments_are_checked_too(tmp_path: Path) -> None:
    (tmp_path / "notes_of_mine_too.py").write_text(FILE)
    mine = "+callbacks.mine={_target_: notes_of_mine_too.Note, path: note.txt, txt: hi}"
    refused = train(tmp_path, *tiny_job("run_dir=run"), mine)
    assert refused.code == 2
    assert "callbacks.mine.txt='hi' is not valid: no such field; one of path, text (did you mean text?)" in refused.err
