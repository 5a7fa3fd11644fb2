"""A /dev/shm that is full, or too small for a batch: one line, and no waiting for what does not come."""

import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.forked import python
from tests.support.runs import TRAIN, Finished, tiny_job, train

LARGE = ["data.seq_len=512", "data.batch_size=16", "data.num_workers=1"]  # 66 kB a batch
SAID = "Error: data.num_workers=1 is not valid: expected 0, or more shared memory (/dev/shm) for data-loader processes"
OWN = ["unshare", "--user", "--map-root-user", "--mount"]  # a /dev/shm of our own, for which nobody need be root
IN_LITTLE = """
import ctypes, os, runpy, subprocess, sys
from pathlib import Path

user, group = os.getuid(), os.getgid()
CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x00020000
if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNS):
    raise OSError(ctypes.get_errno(), "unshare")
Path("/proc/self/setgroups").write_text("deny")
Path("/proc/self/uid_map").write_text(f"0 {user} 1")
Path("/proc/self/gid_map").write_text(f"0 {group} 1")
script, *sys.argv = sys.argv[1:]
subprocess.run(["sh", "-ec", script], check=True)
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def in_little(cwd: Path, size: str, first: str, *arguments: str) -> Finished:
    """train.py in a process with a /dev/shm of this size, after a command in it."""
    if subprocess.run([*OWN, "true"], capture_output=True).returncode:
        pytest.skip("this kernel gives no name spaces to its users")
    script = f"mount --make-rprivate /; mount -t tmpfs -o size={size} tmpfs /dev/shm; {first}"
    return python(cwd, "-c", IN_LITTLE, script, str(TRAIN), *arguments)


@pytest.mark.parametrize(
    ("size", "first"), [("64k", "true"), ("16k", "head -c 16384 /dev/zero > /dev/shm/full")], ids=["small", "full"]
)
def test_a_real_one_is_said(tmp_path: Path, size: str, first: str) -> None:
    ended = in_little(tmp_path, size, first, *tiny_job(*LARGE), "run_dir=run")
    assert ended.code == 2, ended.err
    assert ended.err.startswith(SAID)
    rest = ended.err.partition("\n")[2]
    assert not rest or rest.startswith("Exception ignored in: <function _MultiProcessingDataLoaderIter.__del__"), rest


def test_one_that_is_large_enough_is_enough(tmp_path: Path) -> None:
    ended = in_little(tmp_path, "1m", "true", *tiny_job(*LARGE), "run_dir=run")
    assert ended.code == 0, ended.err


def test_what_torch_says_of_it_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everywhere: without a name space of its own."""

    def full(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    ended = train(tmp_path, *tiny_job(), "data.num_workers=1", "run_dir=run")
    assert ended.code == 2
    assert ended.err.startswith(SAID)
    assert ended.err.count("\n") == 1
