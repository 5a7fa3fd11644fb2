"""Look at everything on this machine's GPU that was never run on one, in order of value, and write what held.

    python -m tools.check_gpu                          # make check-gpu; writes results/gpu-DEVICE.md
    python -m tools.check_gpu only=main_job,one_billion
    python -m tools.check_gpu device=cpu output=dry.md # every item at toy size, to see that the items work

Stops at nothing: each item is a process of its own, an error is a finding, one that hangs is ended after a third of the
time, and what has no time left says so. The report is written anew after each item. The exit code is 1 where something
did not hold.
"""

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from core import cli
from core.atomic_write import write_whole
from core.errors import UserError, one_line, require, suggest
from core.printable import cell
from core.provenance import provenance
from tools.gpu_items import ITEMS, ROOT, Finding

HELD = {True: "held", False: "**not held**", None: "-"}


@dataclass(frozen=True)
class CheckConfig:
    """Holds the fields that `python -m tools.check_gpu` takes.

    Attributes:
        device: where it looks; cpu: a dry run at toy size.
        only: the items; none: all.
        minutes: after which no further item is begun, and the one in progress is ended; a third of them is the most
            that one item gets.
        output: the report; null: results/gpu-DEVICE.md.
    """

    device: Literal["cuda", "cpu"] = "cuda"
    only: tuple[str, ...] = ()
    minutes: float = 8.0
    output: Path | None = None

    def __post_init__(self) -> None:
        for name in self.only:
            require(name in ITEMS, "only", name, suggest(name, ITEMS))
        require(self.minutes > 0, "minutes", self.minutes, "a number > 0")


def look(name: str, device: str, folder: Path, seconds: float) -> list[Finding]:
    """Return the findings of an item, which has so many seconds."""
    findings = folder / f"{name}.jsonl"
    code = "import sys; from pathlib import Path; from tools.gpu_items import Place, look_at; "
    code += "look_at(sys.argv[1], Place(sys.argv[2], Path(sys.argv[3])), Path(sys.argv[4]))"
    command = [sys.executable, "-c", code, name, device, str(folder), str(findings)]
    # What it says goes into a file: a pipe would have to be read until the last of those that it has started is gone.
    with open(folder / f"{name}.stderr", "w+") as said:
        # In a session of its own: what it has started ends with it, and leaves the GPU.
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)
        try:
            exit_code = process.wait(seconds)
            said.seek(0)
            end = "" if exit_code == 0 else f"exit code {exit_code}: {one_line(said.read())[-200:]}"
        except subprocess.TimeoutExpired:
            end = f"ended after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = findings.read_text().splitlines() if findings.is_file() else []
    found = [Finding(*json.loads(line)) for line in lines]
    return [*found, Finding(name, False, end)] if end else found


def report(found: list[Finding], device: str, seconds: float) -> str:
    """Return the findings as Markdown; figures of several lines stand below the table."""
    lines = [f"# {device}", "", f"`make check-gpu`, {seconds:.0f} s.", ""]
    with contextlib.suppress(ImportError):  # without torch, which is a finding
        made = provenance(device)
        lines += [", ".join(f"{name} {value}" for name, value in made.items() if value is not None and value != ""), ""]
    lines += ["| item | held or not | figure |", "|---|---|---|"]
    longer = []
    for finding in found:
        figure = finding.figure
        if "\n" in figure:
            longer += ["", f"## {finding.what}", "", figure.strip()]
            figure = "below"
        lines.append(f"| {finding.what} | {HELD[finding.held]} | {one_line(figure).replace('|', '/')} |")
    return "\n".join([*lines, *longer, ""])


def device_name(device: str) -> str:
    """Return the device in words.

    Raises:
        UserError: there is no GPU.
        ImportError: there is no torch that could be asked.
    """
    import torch  # here: without it there still is a report

    if device == "cpu":
        return f"dry run on {platform.machine()}"
    if not torch.cuda.is_available():
        raise UserError("no CUDA device is here: device=cpu makes a dry run")
    return torch.cuda.get_device_name()


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let a time limit's signal end in a report, too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@cli.tool
def main(config: CheckConfig) -> None:
    began, found, interrupted = time.monotonic(), list[Finding](), False
    try:
        device = device_name(config.device)
    except ImportError as error:
        device = f"{config.device} without torch"
        found.append(Finding("torch", False, one_line(error)))
    name = re.sub(r"\W+", "-", device.lower()).strip("-")
    output = config.output or ROOT / f"results/gpu-{name}.md"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, sigterm_as_ctrl_c():
        for item in config.only or tuple(ITEMS):
            left = 60 * config.minutes - (time.monotonic() - began)
            if left < 5:
                found.append(Finding(item, None, "not reached: no time was left"))
            elif interrupted:
                found.append(Finding(item, None, "not reached: interrupted"))
            else:
                print(f"{item} ...", flush=True)
                try:
                    found += look(item, config.device, Path(folder), min(left, 60 * config.minutes / 3))
                except KeyboardInterrupt:
                    found.append(Finding(item, False, "interrupted"))
                    interrupted = True
            text = report(found, device, time.monotonic() - began)
            write_whole(output, partial(Path.write_text, data=text))
    table = Table("item", "held or not", "figure", title=device)
    for finding in found:
        figure = "in the report" if "\n" in finding.figure else finding.figure
        table.add_row(cell(finding.what), HELD[finding.held].strip("*"), cell(figure, None))
    Console(width=None if Console().is_terminal else 160).print(table)
    print(f"Written: {output}")
    if interrupted:
        raise KeyboardInterrupt
    if any(finding.held is False for finding in found):
        raise SystemExit(cli.FAULT)


if __name__ == "__main__":
    cli.run(main)
