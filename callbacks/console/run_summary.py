"""Sums up what a run came to, as a table on the console and as summary.json."""

import json
import math
import shlex
import time
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from callbacks.protocols import CountsUnits
from core.atomic_write import write_whole
from core.early_end import how_it_ended
from core.event_files import event_files, has_curves
from core.printable import cell, printable
from core.provenance import device_of, provenance
from core.run_folder import resume_command
from core.status import DIVERGED, DONE, PROVENANCE, TIMED_OUT
from core.task import task_of

MEASURED = "run_summary"  # in a checkpoint
COMMANDS = ("tensorboard", "watch", "resume")
"""Keys of the summary that are command lines."""
FOR_FILES = (PROVENANCE, "figures", "main")
"""Keys of the summary that are not printed: where it comes from, what stands there by itself, what tools compare by."""
OVERVIEW_PAGE = "http://localhost:6006/#custom_scalars"
"""TensorBoard's page opens on another tab, in which groups of curves are sorted by name."""
FEW_EPOCHS = 4
"""So often a corpus can be read nearly as well as new text (2305.16264)."""


class RunSummary(L.Callback):
    """Writes RUN/summary.json when training ends, and prints the same.

    What was measured is in each checkpoint too: a run that was killed behind its last save is summed up by the process
    that resumes it, which trains nothing.

    | key | unit |
    |---|---|
    | status, reason | as status.json has them: done, stopped, timed_out or diverged, and by whom and why |
    | loss_unit | that of all losses: nats per token, or per image |
    | train_loss, val_loss | null where not finite |
    | val_perplexity | exp(val_loss) |
    | val_bits_per_byte | bits per byte of the validation text |
    | bigram_loss | on the same validation sequences; null for large vocabularies |
    | unigram_loss | likewise, of the tokens' frequencies alone: a model above it has learned nothing of context; of |
    | | images that of the classes |
    | figures | what else is measured of held-out data, by name, as accuracy; null where not finite |
    | main | the one of them that runs are compared by; or loss |
    | steps, tokens | since step 0; of images, images in the place of tokens |
    | tokens_per_second | mean of the process that trained last; likewise |
    | seconds | wall clock of that process' training, validation included |
    | total_seconds | of all processes that have trained it, each up to the checkpoint that the next one resumed |
    | parameters, active_parameters | count |
    | tensorboard | command line; null where another logger keeps the curves |
    | watch | command line of the live page of all runs beside this one; null where it cannot read the curves |
    | resume | command line that goes on: twice as long, or up to the end that a run stopped early did not reach; null |
    | | where there is no last checkpoint, no command line that began the run, no time left, or a loss |
    | | that is no number |
    | provenance | commit of this project, whether it was changed since, versions, processor, threads, device, |
    | | hash of the corpus |

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = Path(run_dir)
        self._started: float | None = None  # in this process
        self._before: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()
        module: Any = pl_module
        total, active = module.num_parameters
        if trainer.is_global_zero:
            config = module.model_config
            print(
                f"{config.placement}, {config.ffn}, {config.num_layers} blocks of dim {config.dim}: "
                f"{total:,} parameters, {active:,} active"
            )
            if (repeats := describe_epochs(trainer)) is not None:
                print(repeats)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # By all processes together: Lightning may reduce a metric.
        checkpoint[MEASURED] = self._measure(trainer, pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._before = checkpoint.get(MEASURED, {})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        summary = self._collect(trainer, pl_module)
        text = json.dumps(summary, indent=2) + "\n"
        write_whole(self.run_dir / "summary.json", lambda unfinished: unfinished.write_text(text))
        table = Table(title="Run summary", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        for key, value in {**summary, **summary["figures"]}.items():
            # Commands are to be copied, and stand below.
            if key in FOR_FILES or key in COMMANDS:
                continue
            table.add_row(
                key.replace("_", " "), f"{value:,.4f}" if isinstance(value, float) else cell(_plain(value), None)
            )
        Console(width=None if Console().is_terminal else 160).print(table)
        words = {
            "tensorboard": "Curves and pictures",
            "watch": "Beside other runs",
            "resume": "Twice as long" if summary["status"] == DONE else "To go on",
        }
        for key in COMMANDS:
            if summary[key] is not None:
                print(f"{words[key]}: {printable(summary[key], limit=None)}")
                if key == "tensorboard":
                    print(f"The overview: {OVERVIEW_PAGE}")

    def _resume_command(self, trainer: L.Trainer, status: str) -> str | None:
        """Return the command that goes on; None where no command line has begun the run and given its steps."""
        begun_so = trainer.max_steps >= 1 and (self.run_dir / "overrides.yaml").is_file()
        if not begun_so or status in (TIMED_OUT, DIVERGED):  # the time counts from the run's first step
            return None
        return resume_command(self.run_dir, 2 * trainer.max_steps if status == DONE else None)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return what only the process that trains knows."""
        task = task_of(pl_module)
        values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        metrics = {key: value for key, value in values.items() if math.isfinite(value)}  # JSON has no NaN
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        counter = next((callback for callback in callbacks if isinstance(callback, CountsUnits)), None)
        seconds = time.monotonic() - self._started if self._started is not None else None
        before = self._before.get("total_seconds") or self._before.get("seconds") or 0.0
        return {
            "train_loss": metrics.get("train/loss"),
            "val_loss": metrics.get("val/loss"),
            "val_perplexity": metrics.get("val/perplexity"),
            "figures": {name: metrics.get(f"val/{name}") for name in task.figures},
            task.counted: counter.total_units if counter else None,
            f"{task.counted}_per_second": counter.units_per_second if counter else None,
            "seconds": seconds,
            "total_seconds": before + seconds if seconds is not None else None,
        }

    def _collect(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        measured = self._measure(trainer, pl_module) if self._started is not None else self._before
        # A Trainer of one's own may have DataLoaders instead, and no command line started it.
        datamodule: Any = getattr(trainer, "datamodule", None)
        is_ours = hasattr(datamodule, "bits_per_byte")
        module: Any = pl_module
        task = task_of(module)
        of_text = is_ours and task.predicts_next  # bits per byte, and bigrams
        total, active = module.num_parameters
        val_loss = measured.get("val_loss")
        best, last = (self.run_dir / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
        status, reason = how_it_ended(trainer)
        return {
            "status": status,
            "reason": reason,
            "loss_unit": task.loss_unit,
            "train_loss": measured.get("train_loss"),
            "val_loss": val_loss,
            "val_perplexity": measured.get("val_perplexity"),
            "val_bits_per_byte": datamodule.bits_per_byte(val_loss) if of_text and val_loss is not None else None,
            "bigram_loss": datamodule.baseline_loss() if of_text else None,
            "unigram_loss": datamodule.unigram_loss() if is_ours else None,
            "figures": measured.get("figures", {}),
            "main": task.main,
            "steps": trainer.global_step,
            **{name: measured.get(name) for name in (task.counted, f"{task.counted}_per_second")},
            "seconds": measured.get("seconds"),
            "total_seconds": measured.get("total_seconds"),
            "parameters": total,
            "active_parameters": active,
            "best_checkpoint": str(best) if best.exists() else None,
            "last_checkpoint": str(last) if last.exists() else None,
            "tensorboard": shlex.join(["tensorboard", "--logdir", str(self.run_dir)])
            if event_files(self.run_dir)
            else None,
            "watch": shlex.join(["python", "-m", "tools.watch", str(self.run_dir.parent)])
            if has_curves(self.run_dir)
            else None,
            "resume": self._resume_command(trainer, status) if last.exists() else None,
            PROVENANCE: provenance(device_of(trainer), getattr(datamodule, "stream_identity", {}).get("corpus")),
        }


def describe_epochs(trainer: L.Trainer) -> str | None:
    """Return a line where a run goes through its corpus more often than new text could be spared; None: it does not."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    there = getattr(datamodule, "num_train_tokens", None)
    if there is None or trainer.max_steps < 1:
        return None
    wanted = trainer.max_steps * trainer.accumulate_grad_batches * datamodule.tokens_per_batch
    if wanted <= FEW_EPOCHS * there:
        return None
    return (
        f"{wanted:,} tokens are {wanted / there:.0f} epochs of a corpus of {there:,}: beyond {FEW_EPOCHS} a model "
        "learns little from them (2305.16264); docs/data.md has larger ones"
    )


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)
