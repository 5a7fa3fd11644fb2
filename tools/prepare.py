"""Make a corpus that train.py reads (data=shards data.path=...) from text.

    python -m tools.prepare input=texts/ output=data/texts                              bytes
    python -m tools.prepare input='logs/*.jsonl.zst' text_field=body tokenizer=bpe:16384 output=data/logs
    python -m tools.prepare input=hf:NAME tokenizer=PATH/tokenizer.json output=data/name processes=8
    python -m tools.prepare inspect data/texts       verifies every checksum, shows statistics and samples

An interrupted preparation goes on where it was when the same command is given again. The result does not depend on the
number of processes. Formats, and what an index holds: docs/data.md.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from core import cli
from core.errors import require
from core.paths import require_path
from core.printable import cell, printable
from datamodules.index import SPLITS
from datamodules.preparation.inspect import describe, describe_unknown, statistics, verify
from datamodules.preparation.prepare import PrepareConfig, prepare
from datamodules.storage import LocalFolder, read_index


@cli.tool
def run_prepare(config: PrepareConfig) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=None, amount="")
        seen = [0, 0]

        def report(num_bytes: int, documents: int, total: int | None) -> None:
            seen[0] += num_bytes
            seen[1] += documents
            amount = f"{seen[0] / 1e6:,.1f} MB, {seen[1]:,} documents"
            progress.update(task, description="tokenizing", total=total, completed=seen[0], amount=amount)

        def say(line: str) -> None:
            console.print(cell(f"Note: {line}", limit=None), soft_wrap=True)

        index = prepare(config, report, say)
    for name in SPLITS:
        split = index.splits[name]
        print(f"{name}: {split.num_tokens:,} tokens of {split.num_documents:,} documents, {split.num_bytes:,} bytes")
    print(f"Train on it: python train.py data=shards data.path={printable(config.output, limit=None)}")


def run_inspect(path: str) -> None:
    storage = LocalFolder(Path(path))
    index = read_index(storage)
    console = Console(width=None if Console().is_terminal else 160)
    num_files = num_bytes = 0
    for _, size in verify(storage, index):
        num_files, num_bytes = num_files + 1, num_bytes + size
    table = Table(title=cell(path), show_header=False)
    for key, value in describe(index):
        table.add_row(key, cell(value, 2000))
    console.print(table)
    found = {name: statistics(storage, name) for name in SPLITS}
    table = Table("", *(name for name in SPLITS))
    for field in dataclasses.fields(found["train"])[:-1]:
        table.add_row(field.name.replace("_", " "), *(_cell(getattr(found[name], field.name)) for name in SPLITS))
    console.print(table)
    for name in SPLITS:
        for sample in found[name].samples:
            print(f"{name}: {printable(repr(sample), limit=None)}")
    print(f"{num_files} files, {num_bytes:,} bytes: every checksum is right")
    if (line := describe_unknown(index, found)) is not None:
        print(f"Note: {line}")


def _cell(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["inspect"] and "--help" not in given:
        require(len(given) == 2, "argument", " ".join(given), "inspect PATH")
        require_path("PATH", given[1])
        run_inspect(given[1])
    else:
        run_prepare(given)


if __name__ == "__main__":
    cli.run(main)
