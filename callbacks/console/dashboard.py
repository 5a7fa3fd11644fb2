"""TensorBoard's page: an overview, one chart a quantity with a line for each block, and what the run is."""

import shlex
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.protocols import HasCharts
from callbacks.scalars import write_scalars
from core.errors import UserError
from core.provenance import device_of, origin
from core.run_folder import read_overrides
from core.task import task_of

OVERVIEW = {
    "loss": ["^train/loss$", "^val/loss$", "^val/bigram_loss$"],
    "learning rate": ["^optim/lr$"],
    "gradient norm": ["^optim/grad_norm$", "^divergence/grad_norm$"],  # the latter at spikes alone
    "gradient of the first block over the last one's": ["^gradients/first_over_last$"],
}
"""What one looks at first: the lines of each chart."""
ROUTER_FIGURES = ("max_load", "load_cv", "dead_experts", "entropy", "top1_margin", "logits_norm")


class Dashboard(L.Callback):
    """Writes, when training starts, and at validations the last one:

    | tag | |
    |---|---|
    | the layout of the tab Custom Scalars | first an overview: loss, rate, gradient norm, speed; then the charts of |
    | | every callback that has some: callbacks.protocols.HasCharts |
    | about (text) | what the run is: settings of its command line, length, corpus, where it comes from; in Markdown |
    | model (text) | parameters by block and kind, in Markdown |
    | val/bigram_loss | nats per token of counted pairs on the validation text, for the overview: a level line from |
    | | the first step on; not where something else than the next token is predicted, nor of large vocabularies |

    A resumed run that goes on in its folder has both texts already.

    Args:
        run_dir: the run's folder, whose overrides.yaml says what was asked for; None: it is not told.
    """

    def __init__(self, run_dir: str | None = None) -> None:
        self.run_dir = run_dir
        self._described = ""  # the folder of the event files that have the texts
        self._begins = False  # the baseline's line has no beginning yet

    def state_dict(self) -> dict[str, Any]:
        return {"described": self._described}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._described = str(state_dict.get("described", "")) if isinstance(state_dict, dict) else ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begins = trainer.global_step == 0
        counted = task_of(pl_module).counted
        overview = {**OVERVIEW, f"{counted} per second": [f"^train/{counted}_per_second$"]}
        layout = {"overview": {title: ["Multiline", lines] for title, lines in overview.items()}}
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        sources = [callback.charts(pl_module) for callback in callbacks if isinstance(callback, HasCharts)]
        for group, charts in (item for source in [*sources, router_charts(pl_module)] for item in source.items()):
            for title, pattern in charts.items():
                layout.setdefault(group, {})[title] = ["Multiline", [pattern]]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_custom_scalars(layout)
                folder = str(Path(logger.log_dir).absolute())
                if folder != self._described:
                    logger.experiment.add_text("about", run_list(trainer, self.run_dir), trainer.global_step)
                    logger.experiment.add_text("model", model_table(pl_module), trainer.global_step)
                    self._described = folder

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        baseline = _bigram_loss(trainer, pl_module) if trainer.is_global_zero else None
        values = {} if baseline is None else {"val/bigram_loss": baseline}
        if self._begins:  # here and not when training starts, which would wait for it
            write_scalars(trainer, values, 1)
        self._begins = False
        write_scalars(trainer, values, trainer.global_step)


def _bigram_loss(trainer: L.Trainer, pl_module: L.LightningModule) -> float | None:
    """Return what a model of the next token has to beat; None: this is none, or it is not counted."""
    measure = getattr(getattr(trainer, "datamodule", None), "baseline_loss", None)
    return measure() if measure is not None and task_of(pl_module).predicts_next else None


def router_charts(pl_module: L.LightningModule) -> dict[str, dict[str, str]]:
    """Return the charts of the routers' health; none of a dense model."""
    model: Any = pl_module.model
    if not model.mixtures():
        return {}
    return {"router": {figure.replace("_", " "): rf"^moe/layer_(\d+|worst)/{figure}$" for figure in ROUTER_FIGURES}}


def run_list(trainer: L.Trainer, run_dir: str | None) -> str:
    """Return Markdown: what the run's command line asked for, its length, and where it comes from; an item each."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    try:
        overrides = read_overrides(Path(run_dir)) if run_dir is not None else []
    except UserError:  # of a Trainer of one's own there are none
        overrides = []
    rows = {"asked for": shlex.join(overrides)} if overrides else {}
    if trainer.max_steps >= 0:
        per_step = getattr(datamodule, "tokens_per_batch", 0) * trainer.accumulate_grad_batches
        rows["length"] = f"{trainer.max_steps:,} steps" + (f" of {per_step:,} tokens" if per_step else "")
    corpus = getattr(datamodule, "stream_identity", {}).get("corpus")
    rows |= {name: str(v) for name, v in origin(device_of(trainer), corpus).items() if v is not None}
    return "\n".join(f"- **{name}** `{_quoted(value)}`" for name, value in rows.items())


def _quoted(value: str) -> str:
    return value.replace("`", "'")


def model_table(pl_module: L.LightningModule) -> str:
    """Return Markdown: a row for each block and one for what is outside of them, a column for each kind of weights."""
    model: Any = pl_module.model
    counts: dict[int, dict[str, int]] = {}
    for block, kind, parameter in model.parameter_groups():
        row = counts.setdefault(block, {})
        row[kind] = row.get(kind, 0) + parameter.numel()
    kinds = list(dict.fromkeys(kind for row in counts.values() for kind in row))
    total, active = model.num_parameters()
    lines = [f"{total:,} parameters, {active:,} active", "", f"| block | {' | '.join(kinds)} | all |"]
    lines.append("|---" * (len(kinds) + 2) + "|")
    for block in sorted(counts, key=lambda number: (number == 0, number)):
        cells = [f"{counts[block][kind]:,}" if kind in counts[block] else "" for kind in kinds]
        lines.append(f"| {block or 'outside'} | {' | '.join(cells)} | {sum(counts[block].values()):,} |")
    return "\n".join(lines)
