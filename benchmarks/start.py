"""Measure how long a user waits: for train.py's first step, for each tool's first line, and for a study of tiny runs.

    python -m benchmarks.start                 writes results/start.md
    python -m benchmarks.start only=tools      what has that in its name

Each command is a process of its own, begun anew each round; the tools read a run of two steps. Processor time is given
beside the wall's, as it says what a busy machine would have delayed.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from benchmarks.measure import check_counts, judged, machine, report
from core import cli

ROOT = Path(__file__).resolve().parents[1]
FIRST_STEP = "step 1/"
JOB = ("experiment=moe_spannorm", "trainer.max_steps=2", "trainer.limit_val_batches=1", "callbacks.text_sample=null")


@dataclass(frozen=True)
class StartConfig:
    """Holds the fields that `python -m benchmarks.start` takes.

    Attributes:
        only: measure only commands that have this in them; the study is called study.
        rounds: how often each is begun.
        runs: how many runs the study has.
        output: the report.
    """

    only: str = ""
    rounds: int = 3
    runs: int = 20
    output: Path = Path("results/start.md")

    def __post_init__(self) -> None:
        check_counts(self, rounds=1, runs=1)


class Wait(NamedTuple):
    """Holds a command, the goal in seconds if there is one, and what its first line of interest begins with."""

    command: tuple[str, ...]
    goal: float | None
    line: str = ""


class Row(NamedTuple):
    """Holds what was measured of one command.

    Attributes:
        command: as it is typed.
        seconds: until the line, by round.
        processor: seconds of processor time until then, of the process and those that it has waited for; the median.
        goal: the most seconds that are asked for; None: it is a part of others.
    """

    command: str
    seconds: list[float]
    processor: float
    goal: float | None

    def __str__(self) -> str:
        middle, least, most = statistics.median(self.seconds), min(self.seconds), max(self.seconds)
        goal = "" if self.goal is None else f"{self.goal:g}: {judged(middle <= self.goal)}"
        return f"| `{self.command}` | {middle:.2f} ({least:.2f} to {most:.2f}) | {self.processor:.2f} | {goal} |"


HEAD = "| command | seconds to the first line (rounds) | processor time, s | goal, s |\n|---|---|---|---|"


def waits(folder: Path, new: Path) -> Iterator[Wait]:
    """Yield what is measured.

    Args:
        folder: where the run `run` of JOB is, and corpora in `data`.
        new: a folder that is not there, below which the commands write.
    """
    run = f"{folder}/run"
    for part in ("torch", "lightning"):
        yield Wait(("-c", f"import {part}; print(1)"), None)
    yield Wait(("train.py", "--help"), 1.5)
    yield Wait(("train.py", *JOB, f"data.root={folder}/data", f"run_dir={new}/run"), 6.0, FIRST_STEP)
    for arguments in (
        ("tools", "--help"),
        ("tools.runs", str(folder)),
        ("tools.compare", run),
        ("tools.watch", str(folder), "port=0"),
        ("tools.prepare", "--help"),
        ("tools.plan", JOB[0]),
        ("tools.generate", run, "prompt=ab", "num_tokens=4"),
        ("tools.evaluate", run),
        ("tools.anatomy", run, "measures=[layer_drop]", f"output={new}/anatomy"),
        ("tools.export", run, f"output={new}/export"),
        ("studies.status", "study=main", "scale=day"),
    ):
        yield Wait(("-m", *arguments), 3.0)


def first_line(wait: Wait) -> tuple[float, float]:
    """Return the seconds until the command prints its line, and the processor time until it has been ended then.

    Raises:
        RuntimeError: it ended without that line.
    """
    before, began = _processor(), time.perf_counter()
    command = [sys.executable, *wait.command]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=_environment()
    ) as process:
        assert process.stdout is not None
        seen = next((line for line in process.stdout if line.strip() and line.startswith(wait.line)), None)
        seconds = time.perf_counter() - began
        process.kill()
    if seen is None:
        raise RuntimeError(f"{' '.join(command)} ended without a line {wait.line!r}")
    return seconds, _processor() - before


def _environment() -> dict[str, str]:
    """Return a user's: without how idle threads wait, which this process has decided for itself (core/idle_threads)."""
    return {**{name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}, "PYTHONUNBUFFERED": "1"}


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(folder: Path, name: str) -> None:
    command = [sys.executable, "train.py", *JOB, f"data.root={folder}/data", f"run_dir={folder}/{name}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def study(folder: Path, runs: int) -> str:
    """Return what a study of so many runs of two steps takes for each, one after the other, beside their training."""
    scale = {"needs": "little", "overrides": [*JOB, f"data.root={folder}/data"]}
    axes = {"model.placement": ["spannorm"]}
    content = {"question": "?", "axes": axes, "seeds": list(range(runs)), "baseline": None, "scales": {"laptop": scale}}
    (folder / "configs/study").mkdir(parents=True)
    (folder / "configs/study/tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    where = [f"hydra.searchpath=[file://{folder}/configs]", f"results_dir={folder}/results", f"runs_dir={folder}/runs"]
    command = [sys.executable, "-m", "studies.run", "study=tiny", *where, "hydra.launcher.n_jobs=1"]
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=_environment())
    each = (time.perf_counter() - began) / runs
    records = [json.loads(path.read_text()) for path in (folder / "results/tiny/laptop").glob("*.json")]
    assert len(records) == runs, records
    trained = statistics.median(record["seconds"] for record in records)
    return (
        f"A study of {runs} runs of two steps took {each:.2f} s a run, one after the other, of which {trained:.2f} s "
        "were training and validation: the rest is Python's, torch's and Lightning's start, the model's and the data's."
    )


def rows(settings: StartConfig, folder: Path) -> Iterator[Row]:
    """Yield what is measured of each command."""
    of_rounds = [waits(folder, folder / f"new{number}") for number in range(settings.rounds)]
    for same in zip(*of_rounds, strict=True):
        command = " ".join(("python", *same[0].command)).replace(f"{folder}/", "").replace(str(folder), ".")
        if settings.only in command:
            seconds, processor = zip(*map(first_line, same), strict=True)
            yield Row(command, list(seconds), statistics.median(processor), same[0].goal)


def verdict(found: Sequence[Row]) -> str:
    """Return how many goals are met."""
    goals = [statistics.median(row.seconds) <= row.goal for row in found if row.goal is not None]
    return f"Goals: {sum(goals)} of {len(goals)} met."


@cli.tool
def main(settings: StartConfig) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(folder, "run")
        said = f"`python -m benchmarks.start`, {settings.rounds} rounds; {machine('cpu')}."
        head = f"# Waiting for the first line\n\n{said}\n"

        def judge(found: list[Row]) -> str:
            more = f"\n\n{study(folder, settings.runs)}" if settings.only in "study" else ""
            return verdict(found) + more

        report(head, HEAD, rows(settings, folder), judge, settings.output)


if __name__ == "__main__":
    cli.run(main)
