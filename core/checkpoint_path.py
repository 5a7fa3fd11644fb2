"""Says which file or folder is meant by the name of a run's checkpoint."""

from pathlib import Path

NAMED = ("last", "best")
"""The checkpoints that a run calls so; any other word is a path."""


def checkpoint_path(folder: Path, checkpoint: str) -> Path:
    """Return where a checkpoint is, whether or not it is there.

    Args:
        folder: the run's.
        checkpoint: last, best, or the path of one.
    """
    return folder / f"checkpoints/{checkpoint}.ckpt" if checkpoint in NAMED else Path(checkpoint)
