"""Files that are written whole, and told from damaged ones; one lock a folder."""

import fcntl
import os
import shutil
import subprocess
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from core import run_lock, tensor_archive
from core.atomic_write import NotWritten, damage, save, unfinished_of, write_whole
from core.checkpoint import keep
from core.errors import ConfigError
from core.run_lock import held
from core.status import LOCK, is_running
from tests.support.damage import small_files
from tests.support.holder import holder
from tests.support.racing import racing
from tests.support.runs import load


class Create:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_every_bit_counts(tmp_path: Path) -> None:
    """Of a small file, a flip is noticed, or what is read is what was written."""
    path = tmp_path / "a.ckpt"
    save({"weight": torch.arange(100)}, path)
    whole, noticed = path.read_bytes(), 0
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        if damage(path):
            noticed += 1
        else:
            assert torch.equal(tensor_archive.load(path)["weight"], torch.arange(100)), place
    assert noticed > 100


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    assert "compressed" in str(damage(tmp_path / "bomb.ckpt"))


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save({"step": 1}, path)
    reason = r"could not be written \(File too large\); what was there under"
    with small_files(100), pytest.raises(NotWritten, match=reason):
        save({"step": 2}, path)
    assert load(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


WRITE = """
def write(unfinished):
    with unfinished.open("w") as file:
        for _ in range(64):
            file.write(sys.argv[1] * 4096)
            file.flush()

for _ in range(60):
    write_whole(Path("a.txt"), write)
"""


@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe"])
def test_what_lies_in_the_place_of_the_unfinished_file_is_not_written_to(tmp_path: Path, kind: str) -> None:
    """In a folder from elsewhere it may be a link to any file of the user's."""
    mine, path = tmp_path / "mine", tmp_path / "run/status.json"
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(unfinished_of(path))
    else:
        mine.write_text("mine") if kind == "link" else None
        unfinished_of(path).symlink_to(mine)
    write_whole(path, lambda unfinished: unfinished.write_text("new"))
    assert path.read_text() == "new"
    assert not path.is_symlink()
    assert mine.exists() == (kind == "link")
    assert kind != "link" or mine.read_text() == "mine"
    assert [part.name for part in path.parent.iterdir()] == ["status.json"]


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """As of output=/dev/null: an administrator's program would take the device away from the whole machine."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(NotWritten, match="it is no regular file"):
        write_whole(path, lambda unfinished: unfinished.write_text("new"))
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_that_write_one_file_do_not_mix(tmp_path: Path) -> None:
    """As two calls of a tool for one run, which no lock of the run keeps apart."""
    imports = "from pathlib import Path; from core.atomic_write import write_whole"
    with racing(tmp_path, imports, WRITE, "a", "b") as processes:
        while any(process.poll() is None for process in processes):
            with suppress(FileNotFoundError):
                content = (tmp_path / "a.txt").read_text()
                assert (len(content), len(set(content))) == (64 * 4096, 1)
    assert [process.returncode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_checkpoint_in_pieces_is_kept_too(tmp_path: Path) -> None:
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for content in ("1", "2"):
        last.mkdir()
        (last / "piece").write_text(content)
        keep(last, previous)
        keep(last, previous)
        shutil.rmtree(last)
        assert (previous / "piece").read_text() == content
    last.write_text("3")
    keep(last, previous)
    keep(last, previous)
    last.unlink()
    assert previous.read_text() == "3"
    assert [path.name for path in tmp_path.iterdir()] == ["previous.ckpt"]


@pytest.mark.parametrize("zipped", [True, False], ids=["as torch saves it", "as it once did"])
def test_code_in_a_pickle_is_found_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, created = tmp_path / "a.ckpt", tmp_path / "created"
    torch.save({"state_dict": {}, "x": Create(created)}, path, _use_new_zipfile_serialization=zipped)
    assert damage(path)
    assert not created.exists()
    torch.load(path, weights_only=False)
    assert created.exists(), "it would have"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_on_a_small_disk_what_was_there_stays(tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        save({"weight": torch.zeros(100)}, tmp_path / "a.ckpt")
        with pytest.raises(NotWritten, match="No space left on device"):
            save({"weight": torch.zeros(1_000_000)}, tmp_path / "a.ckpt")
        assert damage(tmp_path / "a.ckpt") is None
        assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_is_held_by_one_process_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as first:
        with pytest.raises(ConfigError, match="a folder in which no other process trains"), held(tmp_path / "run"):
            pass
        assert is_running(tmp_path / "run")
        first.kill()
        first.wait()
        assert not is_running(tmp_path / "run"), "although its child lives"
        with held(tmp_path / "run"):
            assert is_running(tmp_path / "run")


def test_a_look_at_the_lock_keeps_no_run_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / LOCK).open("w") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        monkeypatch.setattr(run_lock.time, "sleep", lambda _: look.close())
        with held(tmp_path):
            assert look.closed
