"""Says where a run's event files lie: in its folder itself, after which TensorBoard then calls the run."""

from pathlib import Path

OLDER = "tensorboard"
"""The folder below it in which those of older runs lie, and in which they go on."""
PREFIX = "events.out.tfevents."
"""How the names of TensorBoard's files begin."""


def event_folder(run: Path) -> Path:
    """Return the folder of a run's event files."""
    older = run / OLDER
    return older if older.is_dir() else run


def event_files(run: Path) -> list[Path]:
    """Return the event files of a run, in the order in which they are read."""
    folder = event_folder(run)
    return sorted(path for path in folder.iterdir() if path.name.startswith(PREFIX)) if folder.is_dir() else []
