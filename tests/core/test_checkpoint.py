"""A run of many processes that goes on in one: its checkpoints are folders, where one process writes a file."""

from pathlib import Path

import pytest

from core.atomic_write import NotWritten
from core.checkpoint import CheckpointIO
from tests.support.damage import small_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    path.mkdir()
    (path / "piece").write_text("of step 4")
    return path


def test_a_file_takes_the_name_of_a_folder(folder: Path) -> None:
    CheckpointIO().save_checkpoint({"step": 6}, folder)
    assert CheckpointIO().load_checkpoint(folder) == {"step": 6}
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("there", [True, False])
def test_what_was_being_saved_when_all_were_killed_is_not_in_the_way(folder: Path, there: bool) -> None:
    half = folder.with_name("last.ckpt.unfinished")
    if there:
        half.mkdir()
    else:
        folder.rename(half)
    CheckpointIO().save_checkpoint({"step": 6}, folder)
    assert CheckpointIO().load_checkpoint(folder) == {"step": 6}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_stays_where_the_file_cannot_be_written(folder: Path) -> None:
    with small_files(100), pytest.raises(NotWritten, match="File too large"):
        CheckpointIO().save_checkpoint({"step": 6}, folder)
    assert (folder / "piece").read_text() == "of step 4"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("address", ["local://{}", "file://{}", "dir::file://{}"])
def test_nothing_is_removed_that_is_named_by_an_address(folder: Path, address: str) -> None:
    """Lightning's own removes a folder by any name that fsspec has for it."""
    CheckpointIO().remove_checkpoint(address.format(folder))
    assert (folder / "piece").exists()
    CheckpointIO().remove_checkpoint(str(folder))
    assert not folder.exists()
    CheckpointIO().remove_checkpoint(folder)
    folder.write_text("a file")
    CheckpointIO().remove_checkpoint(folder)
    assert not folder.exists()
