"""Runs the project's command lines in child processes with limits of time and memory, and watches what they touch."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from tests.support.runs import ROOT

CPU_SECONDS, SECONDS = 20.0, 120.0  # many times what a case takes; the second is for machines that do other things too
MEMORY = 3 << 29  # address space beyond what an idle process with everything imported has
GROWTH = 700 << 20  # resident memory beyond that process'
FILE_SIZE = 64 << 20


class Outcome(NamedTuple):
    """How a command line ended.

    Attributes:
        code: exit code; negative: the signal that ended it.
        out, err: what it printed.
        cpu_seconds: that it took.
        memory: most resident memory, in bytes, beyond an idle process'.
        touched: what it did outside of its folders, a line each.
        left: it left a process behind.
    """

    code: int
    out: str
    err: str
    cpu_seconds: float
    memory: int
    touched: str
    left: bool

    @property
    def message(self) -> str:
        """The line that says what is wrong."""
        return next((line for line in self.err.splitlines() if line.startswith("Error: ")), "")


class World:
    """A folder for one case: `work`, in which it runs, and around it what it must leave alone.

    Attributes:
        root: holds all of it.
        work: the working folder; empty.
        cache: where shards from elsewhere may be kept.
        canary: a path at which code from a hostile file would make a file.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.work, self.canary, self.cache = root, root / "work", root / "ran", root / "cache"
        for folder in ("work", "cache", "home", "tmp", "beside"):
            (root / folder).mkdir()
        for kept in ("home/.profile", "beside/notes.txt", "beside/array.npy"):
            (root / kept).write_text("mine\n")
        self._around = self.around()

    def around(self) -> dict[str, object]:
        """All that lies outside of the folders in which a case may write."""
        own = ("work", "cache", "tmp")
        return {name: what for name, what in tree(self.root).items() if name.partition("/")[0] not in own}

    def assert_untouched(self) -> None:
        assert not self.canary.exists(), "code from a file ran"
        assert self.around() == self._around, "something outside of the working folder changed"


def tree(folder: Path) -> dict[str, object]:
    """{name: what is there} of all below a folder; a file by its size and checksum, and nothing is followed."""
    found: dict[str, object] = {}
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            here = Path(path, name)
            key = os.path.relpath(here, folder)
            if here.is_symlink():
                found[key] = f"link to {os.readlink(here)}"
            elif here.is_file():
                found[key] = here.stat().st_size, zlib.crc32(here.read_bytes())
            else:
                found[key] = "folder" if here.is_dir() else "special"
    return found


class Sandbox:
    """A server process, started once, and its children."""

    def __init__(self) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
        names = ("HYDRA_FULL_ERROR", "HYDRA_FULL_ERROR_IS_OURS")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {name: str(self._scratch / "caches") for name in ("MPLCONFIGDIR", "HF_HOME", "XDG_CACHE_HOME")}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "agg",
            "TOKENIZERS_PARALLELISM": "0",
        }
        with (self._scratch / "server").open("w") as said:
            self._server = self._start(environment, said)
        self.cases = 0
        self._answer(300)

    def _start(self, environment: dict[str, str], said: IO[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.fuzz.server"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
        )

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    @contextlib.contextmanager
    def world(self) -> Iterator[World]:
        """A new one, which is gone afterwards."""
        root = Path(tempfile.mkdtemp(prefix="world-", dir=self._scratch))
        try:
            yield World(root)
        finally:
            shutil.rmtree(root)

    def run(self, world: World, program: str, *arguments: str, port: int | None = None) -> Outcome:
        """`python train.py ARGUMENTS`, or `python -m MODULE ARGUMENTS`, in the world's working folder.

        It may connect to the port on this machine.
        """
        texts = {name: self._scratch / name for name in ("out", "err", "report", "memory_before")}
        caches = self._scratch / "caches"
        case = {
            **{name: str(path) for name, path in texts.items()},
            "program": program,
            "arguments": [os.fsencode(argument).hex() for argument in arguments],
            "cwd": str(world.work),
            "inside": [os.path.realpath(path) for path in (world.work, world.cache, world.root / "tmp", caches)],
            "port": port,
            "environment": {"HOME": str(world.root / "home"), "TMPDIR": str(world.root / "tmp"), "COLUMNS": "200"},
            "memory": MEMORY,
            "file_size": FILE_SIZE,
            "cpu_seconds": CPU_SECONDS,
            "seconds": SECONDS,
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(case) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._answer(SECONDS + 30))
        self.cases += 1
        out, err, touched, before = (path.read_text(errors="replace") for path in texts.values())
        memory = answer["most_memory"] - int(before)
        return Outcome(answer["code"], out, err, answer["cpu_seconds"], memory, touched, answer["left"])

    def _answer(self, seconds: float) -> str:
        assert self._server.stdout is not None
        readable, _, _ = select.select([self._server.stdout], [], [], seconds)
        line = self._server.stdout.readline() if readable else ""
        assert line, f"the server has not answered: {(self._scratch / 'server').read_text()[-2000:]}"
        return line
