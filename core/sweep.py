"""Passes on what a sweep's processes tell each other: which overrides vary, and how each run ended.

A run that cannot work, or whose training fails, ends by itself and not the sweep. At the end the process that started
the sweep says which runs failed, and why.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from core.errors import ConfigError, writing
from core.printable import printable

WORST_LOSS = 1e6
"""A sweeper is told this of a run without a finite loss: worse than any, but finite, as samplers want it."""

NOTES = "SPANNORM_SWEEP_NOTES"
"""A variable for a sweep's processes that names the folder of their notes."""
FIXED = "fixed.json"


_unwritten: dict[str, dict[str, Any]] = {}
"""The notes of this process that could not be written, by the number of the run."""


class Failure(NamedTuple):
    """A failed run: its exit code and reason.

    Attributes:
        code: the exit code that the run by itself would have had.
        reason: in a line.
    """

    code: int
    reason: str


class SweepNotes(Callback):
    """Hydra's callback that makes the folder of the notes before the first run: hydra.callbacks in configs/.

    The folder lies in hydra.sweep.dir, which is where launchers on other machines can write too.
    """

    own: Path | None = None  # of the sweep that this process has started

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Note what is the same for all runs."""
        folder = Path(config.hydra.sweep.dir).absolute()
        try:
            with writing("hydra.sweep.dir", folder):
                folder.mkdir(parents=True, exist_ok=True)
                notes = Path(tempfile.mkdtemp(prefix=".notes-", dir=folder))
        except ConfigError as error:
            print(f"Error: {printable(error, limit=None)}", file=sys.stderr)
            raise SystemExit(2) from None  # Hydra makes a warning of anything else
        (notes / FIXED).write_text(json.dumps(_fixed_fields(config)))
        SweepNotes.own = notes
        os.environ[NOTES] = str(notes)


def _fixed_fields(config: DictConfig) -> list[str]:
    """Return the fields that the command line, or the sweeper's configuration, sets to a single value."""
    given: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    try:
        parsed = OverridesParser.create().parse_overrides([*given, *(f"{k}={v}" for k, v in params.items())])
    except HydraException:  # which Hydra itself is about to say
        return []
    varies = {override.get_key_element(): override.is_sweep_override() for override in parsed}  # the last one counts
    return [field for field, sweeps in varies.items() if not sweeps]


def is_swept() -> bool:
    """Return whether this process is at a run of a sweep, rather than at a single run."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def swept_overrides(overrides: Sequence[str]) -> list[str]:
    """Return those of a run's overrides that differ between the runs of its sweep; none of a single run."""
    notes = _notes()
    if notes is None:
        return []
    fixed = json.loads((notes / FIXED).read_text())
    return [override for override in overrides if override.partition("=")[0] not in fixed]


def note(ended: bool, failure: Failure | None = None) -> None:
    """Leave word that the run in progress has begun, has ended, or has failed.

    Where the note cannot be written the sweep goes on all the same: this process remembers it, and says so.
    """
    try:
        notes = _notes()
        if notes is None:
            return
        overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        content = {"overrides": swept_overrides(overrides), "ended": ended, "failure": failure}
        path = notes / f"{HydraConfig.get().job.num}.json"
        _unwritten.pop(path.stem, None)
        new = path.with_suffix(".new")
        try:
            new.write_text(json.dumps(content))
            new.replace(path)
        except OSError:
            _unwritten[path.stem] = content
            raise
    except OSError as error:
        print(f"The sweep cannot note how its runs end: {error}", file=sys.stderr, flush=True)


def _notes() -> Path | None:
    folder = Path(os.environ.get(NOTES, ""))
    return folder if is_swept() and (folder / FIXED).exists() else None


def conclude() -> int:
    """Say which runs failed at the end of a sweep that this process has started, and remove the notes.

    Returns:
        The exit code of the first run that failed; 0: none did, or there was no sweep.
    """
    notes, SweepNotes.own = SweepNotes.own, None
    if notes is None:
        return 0
    os.environ.pop(NOTES, None)
    written = {path.stem: json.loads(path.read_text()) for path in notes.glob("[0-9]*.json")}
    runs = {
        int(number): run for number, run in sorted({**written, **_unwritten}.items(), key=lambda item: int(item[0]))
    }
    _unwritten.clear()
    shutil.rmtree(notes, ignore_errors=True)
    failures = {
        number: Failure(*run["failure"]) if run["failure"] else Failure(1, "it did not end")
        for number, run in runs.items()
        if run["failure"] or not run["ended"]
    }
    if failures:
        print(f"\n{len(failures)} of {len(runs)} runs of the sweep failed:", file=sys.stderr)
        for number, failure in failures.items():
            what = " ".join(runs[number]["overrides"])
            print(printable(f"  {number}{what and f'  {what}'}: {failure.reason}", limit=None), file=sys.stderr)
    if all(failure.code == 2 for failure in failures.values()) and len(failures) == len(runs):
        _tidy(notes.parent)
    return next(iter(failures.values())).code if failures else 0


def _tidy(folder: Path) -> None:
    """Remove what Hydra has made for a sweep of which nothing was run."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir():
                with suppress(OSError):
                    path.rmdir()
        if [path.name for path in folder.iterdir()] in ([], ["multirun.yaml"]):
            shutil.rmtree(folder)
