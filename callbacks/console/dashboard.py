"""TensorBoard's page: one chart a quantity with a line for each block, and a table of the model."""

from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.protocols import HasCharts

OVERVIEW = {
    "loss": ["^train/loss$", "^val/loss$"],
    "learning rate": ["^optim/lr$"],
    "gradient norm": ["^optim/grad_norm$"],
    "gradient of the first block over the last one's": ["^gradients/first_over_last$"],
    "tokens per second": ["^train/tokens_per_second$"],
}
"""What one looks at first: the lines of each chart."""
ROUTER_FIGURES = ("max_load", "load_cv", "dead_experts", "entropy", "top1_margin", "logits_norm")


class Dashboard(L.Callback):
    """Writes, when training starts:

    | tag | |
    |---|---|
    | the layout of the tab Custom Scalars | first an overview: loss, rate, gradient norm, speed; then the charts of |
    | | every callback that has some: callbacks.protocols.HasCharts |
    | model (text) | parameters by block and kind, in Markdown |
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layout = {"overview": {title: ["Multiline", lines] for title, lines in OVERVIEW.items()}}
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        sources = [callback.charts(pl_module) for callback in callbacks if isinstance(callback, HasCharts)]
        for group, charts in (item for source in [*sources, router_charts(pl_module)] for item in source.items()):
            for title, pattern in charts.items():
                layout.setdefault(group, {})[title] = ["Multiline", [pattern]]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_custom_scalars(layout)
                logger.experiment.add_text("model", model_table(pl_module), trainer.global_step)


def router_charts(pl_module: L.LightningModule) -> dict[str, dict[str, str]]:
    """Return the charts of the routers' health; none of a dense model."""
    model: Any = pl_module.model
    if not model.mixtures():
        return {}
    return {"router": {figure.replace("_", " "): rf"^moe/layer_\d+/{figure}$" for figure in ROUTER_FIGURES}}


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
