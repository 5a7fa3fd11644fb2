"""Says where a result comes from: which code, which versions, which machine, which command."""

import os
import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIELDS = (
    "commit",
    "dirty",
    "python",
    "torch",
    "lightning",
    "system",
    "processor",
    "cores",
    "threads",
    "device",
    "corpus",
)
OF_THE_USER = ("host", "command")
"""What else RUN/provenance.json has; summaries and the records of studies, which are passed on, do not."""
FILE = "provenance.json"
"""Of the process that began the run; one that resumes it leaves provenance-resumed-TIME.json."""


def provenance(device: str, corpus: Any = None) -> dict[str, Any]:
    """Return the fields of FIELDS, each a text, an integer or a boolean; None where it cannot be told.

    Args:
        device: what the run computes on, in words.
        corpus: the hash of what it is trained on; of a mixture a list of them.
    """
    import torch

    commit, dirty = _checkout(ROOT)
    found = {
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "corpus": " ".join(map(str, corpus)) if isinstance(corpus, list | tuple) else corpus,
    }
    return {field: found[field] for field in FIELDS}


def origin(device: str, corpus: Any = None) -> dict[str, Any]:
    """Return the fields of FIELDS and those of OF_THE_USER: host, and the command line of this process, whole."""
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    return {**provenance(device, corpus), "host": platform.node() or None, "command": command}


def device_of(trainer: Any) -> str:
    """Return on what a Trainer computes, in words: `2 x NVIDIA H200`."""
    import torch

    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{trainer.world_size} x {name}"


@cache  # of the code that was imported: a long run's checkout may have moved on when it ends
def _checkout(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit of this project's checkout, and whether tracked files differ from it."""
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return commit or None, None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    """Return what git says of a checkout; None: there is no git, or no checkout of its own."""
    if not (root / ".git").exists():  # installed, or unpacked inside somebody else's checkout
        return None
    try:
        ended = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip()


def _processor() -> str | None:
    """Return the processor's name as its maker has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux; platform.processor() would start a program
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
