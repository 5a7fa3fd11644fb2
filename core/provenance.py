"""Says where a result comes from: which code, which versions, which machine."""

import os
import platform
import subprocess
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


def provenance(device: str, corpus: Any = None) -> dict[str, Any]:
    """Return the fields of FIELDS, each a text, an integer or a boolean; None where it cannot be told.

    Args:
        device: what the run computes on, in words.
        corpus: the hash of what it is trained on; of a mixture a list of them.
    """
    import torch

    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    found = {
        "commit": commit or None,
        "dirty": bool(changes) if changes is not None else None,
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


def _git(*arguments: str) -> str | None:
    """Return what git says of this project's checkout; None: there is no git, or no checkout of its own."""
    if not (ROOT / ".git").exists():  # installed, or unpacked inside somebody else's checkout
        return None
    try:
        ended = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20, check=True
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
