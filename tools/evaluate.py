"""Measure how good a trained model is: loss on corpora, and tasks of the lm-evaluation-harness.

    python -m tools.evaluate RUN                                     its own validation data, once more
    python -m tools.evaluate RUN data=data/texts,data/code           the validation splits of prepared corpora
    python -m tools.evaluate RUN tasks=hellaswag,piqa limit=200      EleutherAI's tasks; they download their data
    python -m tools.evaluate RUN tasks=paper                         all seven of tools/evaluation/tasks/paper.yaml
    python -m tools.evaluate RUN tasks=offline                       three tiny ones of tools/evaluation/tasks/offline

Prints tables, writes RUN/evaluation/, and adds the figures to the run's TensorBoard log, at the step of the weights.
"""

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import cli
from core.atomic_write import write_whole
from core.dataclass_cli import FIRST
from core.errors import UserError, require, writing
from core.event_files import event_folder
from core.printable import cell, printable
from core.untrusted import within

if TYPE_CHECKING:
    from core.open_run import OpenRun
    from tools.evaluation.corpora import Loss


@dataclass(frozen=True)
class EvaluateConfig:
    """Holds the fields that `python -m tools.evaluate` takes.

    Attributes:
        run: a run folder, such as runs/moe_spannorm/TIME.
        data: folders of prepared corpora; none: the run's own data.
        batches: take so many batches of each corpus; null: of its own data as many as in training, else all.
        tasks: run these of the lm-evaluation-harness, instead of a corpus.
        num_fewshot: put so many examples before each question; null: what the task says.
        limit: ask at most so many questions of each task; null: all.
        window: the number of tokens that the model reads in a task; null: as many as it was trained on.
        batch_size: ask so many questions of a task side by side; null: 16.
        checkpoint: the one to take: last, best, or a path.
        allow: what the run's configuration names, and you vouch for: classes of yours, as my_file.Mine, and addresses.
    """

    run: Path = field(metadata=FIRST)
    data: tuple[str, ...] = ()
    batches: int | None = None
    tasks: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    window: int | None = None
    batch_size: int | None = None
    checkpoint: str = "last"
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("batches", 1), ("num_fewshot", 0), ("limit", 1), ("window", 2), ("batch_size", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, name, value, f"an integer >= {least}")
        apart = not (self.data and self.tasks)
        require(apart, "tasks", ",".join(self.tasks), "none where data is given: a corpus or tasks, one at a time")
        require(not self.tasks or self.batches is None, "batches", self.batches, "null with tasks; their size is limit")
        for name in ("num_fewshot", "limit", "window", "batch_size"):
            value = getattr(self, name)
            require(bool(self.tasks) or value is None, name, value, "null where there are no tasks: it is about them")


def evaluate_corpora(run: "OpenRun", config: EvaluateConfig) -> dict[str, float]:
    """Return {TensorBoard tag: value}."""
    from tools.evaluation.corpora import losses_of

    losses = losses_of(run, list(config.data), config.batches)
    show(losses)  # first: the folder may be on a disk that is full, or that cannot be written to
    folder = within(run.folder, run.folder / "evaluation" / f"step_{run.step}", "remove the link")
    scalars: dict[str, float] = {}
    for loss in losses:
        write = partial(Path.write_text, data=json.dumps(asdict(loss), indent=2) + "\n")
        write_whole(folder / f"loss_{loss.name}.json", write)
        figures = {"loss": loss.loss, "perplexity": loss.perplexity, "bits_per_byte": loss.bits_per_byte}
        scalars.update((f"eval/{loss.name}/{key}", value) for key, value in figures.items() if value is not None)
    print(f"Every position: {printable(folder, limit=None)}/loss_NAME.json")
    return scalars


def show(losses: "list[Loss]") -> None:
    """Print two tables: of the corpora, and of the positions."""
    from rich.console import Console
    from rich.table import Table

    from tools.evaluation.corpora import buckets

    table = Table("corpus", "loss, nats/token", "perplexity", "bits/byte", "tokens")
    positions = Table("positions", title="loss by position")
    for loss in losses:
        positions.add_column(cell(loss.name))
        bits = "-" if loss.bits_per_byte is None else f"{loss.bits_per_byte:.4f}"
        table.add_row(cell(loss.name), f"{loss.loss:.4f}", f"{loss.perplexity:,.3f}", bits, f"{loss.tokens:,}")
    for row in zip(*(buckets(loss.by_position) for loss in losses), strict=True):
        first, last, _ = row[0]
        span = f"{first}" if first == last else f"{first}-{last}"
        positions.add_row(span, *(f"{mean:.4f}" for _, _, mean in row))
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table, positions)


def evaluate_tasks(run: "OpenRun", config: EvaluateConfig) -> dict[str, float]:
    """Return {TensorBoard tag: value}.

    Raises:
        ConfigError: the run's data is no text, which is what tasks are made of.
    """
    from datamodules.tokenizers import NumberTokenizer

    is_text = not isinstance(run.datamodule.tokenizer, NumberTokenizer)
    valid = f"none: they are texts, and what {run.folder} was trained on is numbers"
    require(is_text, "tasks", ",".join(config.tasks), valid)
    try:
        from tools.evaluation.harness import run_tasks
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -r requirements-eval.txt") from error
    window: Any = config.window or run.datamodule.seq_len
    found = run_tasks(run, list(config.tasks), window, config.batch_size or 16, config.num_fewshot, config.limit)
    return {f"eval/{task}/{metric}": value for task, values in found.items() for metric, value in values.items()}


@cli.tool
def main(config: EvaluateConfig) -> None:
    from torch.utils.tensorboard import SummaryWriter

    from core.open_run import open_language_run

    run = open_language_run(config.run, config.checkpoint, config.allow)
    scalars = (evaluate_tasks if config.tasks else evaluate_corpora)(run, config)
    folder = within(run.folder, event_folder(run.folder), "remove the link")
    with writing("RUN", run.folder), SummaryWriter(folder) as writer:
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, run.step)


if __name__ == "__main__":
    cli.run(main)
