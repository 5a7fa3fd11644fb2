"""What the tests of whole runs share: a corpus of a few kilobytes, a tiny job, and a way to call train.py."""

import argparse
import atexit
import contextlib
import functools
import io
import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.event_files import event_files, event_folder
from datamodules.token_datamodule import TokenDataModule
from datamodules.writer import write_corpus

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "train.py"
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiment").glob("*.yaml"))
TEXT = Path(argparse.__file__).read_bytes()
SHARD = 4096  # tokens in a shard of the corpus that tests of reading share
DESCRIPTION = {"tokenizer": "byte", "vocab_size": 257, "source": "a test"}


def documents(num_documents: int = 10) -> Iterator[tuple[str, bytes, npt.NDArray[np.uint16]]]:
    """The source of one module in equal pieces, the last of which is for validation."""
    size = len(TEXT) // num_documents
    for n in range(num_documents):
        piece = TEXT[n * size : (n + 1) * size]
        split = "train" if n < num_documents - 1 else "val"
        yield split, piece, np.frombuffer(piece, np.uint8).astype(np.uint16)


class TinyData(TokenDataModule):
    """The tiny corpus, below any folder."""

    def __init__(self, root: Path, **arguments: Any) -> None:
        super().__init__(**{"seq_len": 32, "batch_size": 4, "val_batches": 2, "num_workers": 0, "seed": 0, **arguments})
        self.root = root
        self.save_hyperparameters(ignore=["root"])

    @property
    def folder(self) -> Path:
        return self.root / "tiny"

    def prepare_data(self) -> None:
        if not self.folder.exists():
            write_corpus(self.folder, documents(), 256, DESCRIPTION)


@functools.cache
def corpus_root() -> Path:
    """A `data.root` that holds the tiny corpus in the place of the standard library's."""
    root = Path(tempfile.mkdtemp(prefix="tiny-corpus-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    write_corpus(root / f"python_stdlib-{platform.python_version()}-byte", documents(), 256, DESCRIPTION)
    return root


def tiny_job(*overrides: str) -> list[str]:
    """Overrides that make any experiment free: two blocks of dim 32, 2 steps of 4 sequences of 32 bytes, or images."""
    of_images = any(override.startswith("experiment=vision") for override in overrides)
    return [
        *([] if of_images else [f"data.root={corpus_root()}", "data.seq_len=32"]),
        "data.batch_size=4",
        "data.val_batches=1",
        "model.dim=32",
        "model.num_layers=2",
        "model.num_heads=2",
        "model.ffn_dim=48",
        "model.moe.num_experts=4",
        "model.moe.expert_dim=24",
        "trainer.max_steps=2",
        "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=1",
        "optim.warmup_steps=2",
        "callbacks.text_sample=null",
        *overrides,
    ]


class Finished(NamedTuple):
    """How a command line ended."""

    code: int | str | None
    out: str
    err: str


def train(cwd: Path, *arguments: str) -> Finished:
    """`python train.py ARGUMENTS` in the folder `cwd`, without the seconds that a process of its own takes to start.

    Nor does Hydra compose all twice, at first to see whether some file asks for a sweep: none of these does.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    asked = any(argument in ("-m", "--multirun") or "hydra" in argument for argument in arguments)
    mode = contextlib.nullcontext() if asked else mock.patch.object(Hydra, "get_mode", return_value=RunMode.RUN)
    with (
        mode,
        contextlib.chdir(cwd),
        mock.patch.object(sys, "argv", [str(TRAIN), *arguments]),
        mock.patch.object(sys, "path", [*sys.path]),
        mock.patch.object(sys, "dont_write_bytecode", True),
        mock.patch.dict(os.environ, {"COLUMNS": "200"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(TRAIN), run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code
    return Finished(code, out.getvalue(), err.getvalue())


def python(cwd: Path, *command: str) -> Finished:
    """`python COMMAND` in a session of its own, so that signals to its group stay in it; ends when all in it have.

    Ctrl-C works in it even where it does not in the process that runs the tests, as under nohup.
    """
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            out, err = process.communicate(timeout=250)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return Finished(process.returncode, out, err)


def run(cwd: Path, run_dir: str, *arguments: str, code: int = 0) -> Path:
    """Train to the end in cwd/RUN_DIR, which exits with this code, and return that folder."""
    finished = train(cwd, *tiny_job(*arguments), f"run_dir={run_dir}")
    assert finished.code == code, finished.err
    return cwd / run_dir


def run_on(cwd: Path, *arguments: str) -> Path:
    """As `run`, in cwd/run, with data that has no root."""
    job = [argument for argument in tiny_job(*arguments) if not argument.startswith("data.root=")]
    finished = train(cwd, *job, "run_dir=run")
    assert finished.code == 0, finished.err
    return cwd / "run"


def events(run_dir: Path) -> EventAccumulator:
    """All that TensorBoard would show; read once while the files stay as they are."""
    folder = event_folder(run_dir.resolve())
    files = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in event_files(folder)]
    return _events(folder, tuple(files))


@functools.lru_cache(maxsize=4)
def _events(folder: Path, _: tuple[tuple[Path, int, int], ...]) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalars(run_dir: Path, tag: str) -> dict[int, float]:
    """{step: value}, in order of the steps: files of processes that began in one second are read in any."""
    return dict(sorted((event.step, event.value) for event in events(run_dir).Scalars(tag)))


def assert_began(folder: Path, step: int) -> None:
    """A run that starts again from nothing would give the same curve; the last process' own events tell them apart."""
    newest = max(event_files(folder), key=lambda path: path.stat().st_mtime_ns)
    first, *_ = EventAccumulator(str(newest), size_guidance={"scalars": 0}).Reload().Scalars("train/loss")
    assert first.step == step


def load(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint, without running any code that it may hold."""
    return torch.load(checkpoint, map_location="cpu", weights_only=True)
