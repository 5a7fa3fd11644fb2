"""A real browser without a window: what a page has become when its scripts have run."""

import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
WITHOUT = "no chromium is installed (Debian: apt-get install chromium)"


def dom(url: str, profile: Path, seconds: int = 10) -> str:
    """The page's HTML after so many seconds of its own clock, which runs as fast as it can."""
    assert CHROMIUM is not None
    switches = ["--headless=new", "--no-sandbox", "--disable-3d-apis", f"--user-data-dir={profile}"]
    command = [CHROMIUM, *switches, f"--virtual-time-budget={1000 * seconds}", "--dump-dom", url]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return ended.stdout
