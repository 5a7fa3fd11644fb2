"""Runs in processes of their own, which kill themselves with SIGKILL at a chosen moment."""

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import torch

from tests.support.forked import server
from tests.support.runs import documents, train

PLACES = {  # a moment is a call, of Python or of C, from within one of these
    "step": ("lightning/pytorch/loops/optimization/automatic.py", "run"),
    "checkpoint": ("core/atomic_write.py", "write_whole"),
    "rotation": ("callbacks/checkpointing/last_checkpoint.py", "_save"),
    "validation": ("lightning/pytorch/loops/evaluation_loop.py", "run"),
    "shards": ("datamodules/writer.py", "write_corpus"),
    "log": ("tensorboard/summary/writer/event_file_writer.py", "flush"),
    "notes": ("core/run_folder.py", "create"),
    "end": ("lightning/pytorch/loops/fit_loop.py", "on_run_end"),
    "summary": ("callbacks/console/run_summary.py", "on_fit_end"),
    "status": ("callbacks/console/run_status.py", "on_fit_end"),
}


class Moments:
    """Counts the calls within each place; ends the process at the call of that number, counted from 1.

    Args:
        place: one of PLACES, where it ends the process.
        number: 0: it only counts.
    """

    def __init__(self, place: str = "", number: int = 0) -> None:
        self.place, self.number = place, number
        self.counts: Counter[str] = Counter()
        self._depth: Counter[str] = Counter()
        self._names: dict[CodeType, str | None] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "return"):
            name = self._name(frame.f_code)
            if name:
                self._depth[name] += 1 if event == "call" else -1
        if event in ("call", "c_call"):
            for place, depth in self._depth.items():
                if depth > 0:
                    self.counts[place] += 1
                    if place == self.place and self.counts[place] == self.number:
                        os.kill(os.getpid(), signal.SIGKILL)

    def _name(self, code: CodeType) -> str | None:
        if code not in self._names:
            found = [
                name
                for name, (file, function) in PLACES.items()
                if code.co_name == function and code.co_filename.endswith(file)
            ]
            self._names[code] = found[0] if found else None
        return self._names[code]


def _library() -> Iterator[tuple[str, bytes]]:
    """A few modules: enough for both splits."""
    for number, document in enumerate(documents(200)):
        yield f"module_{number}.py", document[1]


def _run(cwd: str, arguments: list[str], moments: Moments | None, connection: Any) -> None:
    torch.set_num_threads(1)
    watched = _profiled(moments) if moments else nullcontext()  # it makes a run several times as long
    with mock.patch("datamodules.python_stdlib.library_documents", _library), watched:
        finished = train(Path(cwd), *arguments)
    connection.send((finished, dict(moments.counts) if moments else {}))


@contextmanager
def _profiled(moments: Moments) -> Iterator[None]:
    threading.setprofile(moments)
    sys.setprofile(moments)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


class Processes:
    """Starts runs from a process in which everything is imported already."""

    def __init__(self) -> None:
        self.context = server()

    def run(self, cwd: Path, *arguments: str, moments: Moments | None = None) -> tuple[int, Any]:
        """(exit code, (Finished, the number of moments in each place); None of one that was killed)."""
        receiving, sending = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_run, args=(str(cwd), list(arguments), moments, sending))
        process.start()
        sending.close()
        try:
            result = receiving.recv()
        except EOFError:
            result = None
        process.join(120)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode, result
