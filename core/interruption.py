"""What becomes of a run that somebody, or Lightning, stops early."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException

from core.errors import UserError, one_line
from core.run_folder import LAST, is_main_process, resume_command


class TrainingInterrupted(Exception):
    """A signal ended the run early; everything is saved.

    Attributes:
        signum: the signal.
        step: optimizer steps done.
    """

    def __init__(self, signum: int, step: int) -> None:
        self.signum, self.step = signum, step
        super().__init__(f"{signal.Signals(signum).name} after step {step}")


@contextmanager
def explained(trainer: L.Trainer, run_dir: Path) -> Iterator[None]:
    """While it trains: an interruption ends in words, the way to go on, and exit code 128 + the signal's number.

    Raises:
        UserError: what Lightning finds wrong with the configuration only now, as a metric that nobody logs.
    """
    try:
        yield
    except TrainingInterrupted as interruption:
        _leave(run_dir, interruption.signum, f"Interrupted: {interruption}. Saved")
    except SystemExit:
        # Lightning's answer to a Ctrl-C that no callback took: before the first step, or the second one.
        if not trainer.interrupted:
            raise
        _leave(run_dir, signal.SIGINT, "Interrupted at once")
    except MisconfigurationException as error:
        raise UserError(one_line(error)) from error


def _leave(run_dir: Path, signum: int, message: str) -> NoReturn:
    if is_main_process():
        way_on = "there was nothing to save."
        if (run_dir / LAST).exists():
            way_on = f"go on with\n  {resume_command(run_dir)}"
        print(f"\n{message}; {way_on}")
    sys.exit(128 + signum)
