"""Says where a run's curves lie: event files in its folder itself, after which TensorBoard calls it, and tables."""

from pathlib import Path

OLDER = "tensorboard"
"""The folder below it in which those of older runs lie, and in which they go on."""
TABLES = "csv/version_*/metrics.csv"
"""Those of logger=csv below it, one for each time that the run was started."""
OVERVIEW = "1_overview"
"""The group of tags that has some curves a second time, for TensorBoard's page alone."""
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


def has_curves(run: Path) -> bool:
    """Return whether the folder is one of a run under logger=tensorboard or logger=csv."""
    return bool(event_files(run)) or any(run.glob(TABLES))
