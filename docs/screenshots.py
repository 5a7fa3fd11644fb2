"""Takes the pictures of docs/monitoring.md again: trains its two runs, and looks at them with Debian's chromium.

    python docs/screenshots.py /tmp/screenshots             into docs/: look at them
    python docs/screenshots.py /tmp/before ../of_then before     what TensorBoard shows first, into results/first-sight/

The first argument is where the runs go; some three minutes on one core. With two more the healthy run alone is trained,
by another checkout of the project, and its tabs are taken as they open, in files that begin with the last argument.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LENGTH = ["trainer.max_steps=120", "data.batch_size=4", "trainer.val_check_interval=40", "data.val_batches=8"]
LOOKED_AT = ["trainer.log_every_n_steps=4", "callbacks.signal_propagation.every_n_steps=10"]
LOOKED_AT += ["callbacks.representation_collapse.every_n_steps=10", "callbacks.text_sample=null"]
JOB = ["model.num_layers=6", "optim.warmup_steps=0", *LENGTH, *LOOKED_AT]
RUNS = {
    "healthy": ["model.placement=spannorm", "model.init=scale_init", "optim.lr=3e-3"],
    "diverging": ["model.placement=postnorm", "model.init=fan_in", "optim.lr=0.1"],
}
BOARD = str(Path(sys.executable).with_name("tensorboard"))
SWITCHES = ["--headless=new", "--no-sandbox", "--disable-3d-apis", "--hide-scrollbars", "--virtual-time-budget=20000"]


def train(folder: Path, checkout: Path, *names: str) -> None:
    """Train the runs that are not there yet."""
    for name in names:
        if not (folder / "runs" / name).exists():
            command = [sys.executable, str(checkout / "train.py"), *JOB, *RUNS[name], f"run_dir=runs/{name}"]
            subprocess.run(command, cwd=folder, check=True)


@contextlib.contextmanager
def serving(*command: str, cwd: Path) -> Iterator[str]:
    """Yield the address at which a command, which gets a free port appended, shows a page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    last = str(port) if command[-1] == "--port" else f"port={port}"
    process = subprocess.Popen([*command, last], cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.2)
        time.sleep(10)  # TensorBoard reads the runs behind its back
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait()


def take(url: str, name: str, size: tuple[int, int]) -> None:
    """Take a picture of a page, NAME.png below the project's folder."""
    chromium = shutil.which("chromium")
    assert chromium, "apt-get install chromium"
    picture = ROOT / f"{name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    window = f"--window-size={size[0]},{size[1]}"
    subprocess.run([chromium, *SWITCHES, window, f"--screenshot={picture}", url], check=True)


def for_the_docs(folder: Path) -> None:
    train(folder, ROOT, "healthy", "diverging")
    with serving(BOARD, "--logdir", "runs/healthy", "--port", cwd=folder) as page:
        take(f"{page}#custom_scalars", "docs/monitoring-healthy", (1400, 900))
    with serving(BOARD, "--logdir", "runs/diverging", "--port", cwd=folder) as page:
        take(f"{page}#images", "docs/monitoring-diverging", (1400, 900))
    with serving(sys.executable, str(ROOT / "tools/watch.py"), "runs", cwd=folder) as page:
        take(page, "docs/monitoring-watch", (1280, 1500))


def first_sight(folder: Path, checkout: Path, when: str) -> None:
    train(folder, checkout, "healthy")
    with serving(BOARD, "--logdir", "runs", "--port", cwd=folder) as page:
        for tab in ("timeseries", "custom_scalars", "hparams", "images"):
            take(f"{page}#{tab}", f"results/first-sight/{when}-{tab}", (1400, 900))


if __name__ == "__main__":
    folder = Path(sys.argv[1]).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) == 2:
        for_the_docs(folder)
    else:
        first_sight(folder, Path(sys.argv[2]).absolute(), sys.argv[3])
