"""Makes a corpus for a run that needs it, once for all runs and processes."""

import fcntl
from pathlib import Path

from core.errors import writing
from core.printable import printable
from datamodules.preparation.prepare import PrepareConfig, prepare


def prepare_once(config: PrepareConfig, announcement: str, compare: bool = False) -> None:
    """Make a corpus unless it is there; another process that starts meanwhile waits for the same one.

    Args:
        config: its `output` is the corpus' folder, below the data's root.
        announcement: printed before, as it takes minutes.
        compare: hold a corpus that is there against its input, which is on this machine.

    Raises:
        ConfigError: by fields of `config`; or `data.root`, which cannot be written to.
    """
    folder = Path(config.output)
    with writing("data.root", folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "index.json").exists():
                _print(announcement)
                prepare(config, say=_print)
            elif compare:
                prepare(config)


def _print(line: str) -> None:
    print(printable(line, limit=None), flush=True)
