"""Signal propagation at initialization: how activations and gradients fare on their way through the blocks.

    python -m tools.propagation model.placement=spannorm model.num_layers=128
    python -m tools.propagation model=moe model.placement=prenorm model.init=fan_in seed=1 output=picture.png
    python -m tools.propagation every_placement=true model.num_layers=64
    python -m tools.propagation init_from=RUN                                     of trained weights: docs/warm_start.md

Takes the same overrides as train.py, builds the model as train.py would, and sends random tokens through it once,
forward and backward; nothing is trained and no data is read. Prints a table with one row a block, and draws the same.
Where docs/theory.md has a prediction (prenorm, postnorm, spannorm, deepnorm, with a dense FFN), it stands beside what
was measured. Writes the picture and nothing else.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from analysis.propagation import BlockSignal, measure
from analysis.theory import Prediction, predict_model
from core import cli
from core.build import build, import_target
from core.dataclass_cli import OVERRIDES
from core.errors import require
from lightning_modules.composing import compose_run
from lightning_modules.config import ModelConfig
from lightning_modules.initialization import init_name
from lightning_modules.warm_start import data_of
from spannorm import PLACEMENTS
from tools.picture import check_picture, save_picture

PICTURES = Path("runs/signal")
NUM_ROWS = 16  # printed, of deeper models

COLUMNS = {
    "variance": "variance",
    "attn_ratio": "attn/\nstream",
    "ffn_ratio": "ffn/\nstream",
    "hidden_gradient": "hidden\ngrad",
    "attn_gradient": "attn\ngrad",
    "ffn_gradient": "ffn\ngrad",
    "cosine": "cosine",
    "effective_rank": "eff.\nrank",
}
PREDICTED = ("variance", "attn_ratio", "ffn_ratio", "hidden_gradient", "cosine")


@dataclass(frozen=True)
class PropagationConfig:
    """Holds the fields that `python -m tools.propagation` takes.

    Attributes:
        overrides: overrides as for train.py, of which those of model, module, optim, seed and init_from
            count, and of the data the sizes.
        output: the picture that is drawn; null: runs/signal/MODEL.png.
        all_rows: print every block, also of a deep model.
        every_placement: print one Markdown row for each placement instead, and draw nothing.
    """

    overrides: tuple[str, ...] = field(default=(), metadata=OVERRIDES)
    output: Path | None = None
    all_rows: bool = False
    every_placement: bool = False


class Report(NamedTuple):
    """Holds what was measured of one model, and what was predicted; None: no theory.

    Attributes:
        init: the name of its init, or of what its weights come from.
    """

    config: ModelConfig
    init: str
    signals: list[BlockSignal]
    predictions: list[Prediction] | None

    @property
    def title(self) -> str:
        config = self.config
        return f"{config.placement}, {config.ffn}, init {self.init}: {config.num_layers} blocks of dim {config.dim}"

    def predicted(self, field: str) -> list[float] | None:
        """Return one figure of every block; gradient norms are anchored at the last block's measured one."""
        if self.predictions is None or field not in PREDICTED:
            return None
        unit = self.signals[-1].hidden_gradient if field == "hidden_gradient" else 1.0
        return [unit * getattr(prediction, field) for prediction in self.predictions]


def report(overrides: Sequence[str], batch_size: int = 4, seq_len: int = 64) -> Report:
    """Build the model that train.py would build under these overrides, and measure it.

    Raises:
        ConfigError, HydraException, OmegaConfBaseException: what cannot be built.
    """
    config = compose_run(overrides)
    valid = "an integer in [0, 2**32)"
    require(type(config.seed) is int and 0 <= config.seed < 2**32, "seed", config.seed, valid)
    config.model.compile = config.model.activation_checkpointing = False  # hooks see neither well, results are the same
    torch.manual_seed(config.seed)
    source = None if config.init_from is None else Path(config.init_from)
    module = _module(config, source)
    if source is not None:
        module.start_from(source)
    module.configure_model()
    generator = torch.Generator().manual_seed(config.seed)
    batch = module.model.example(batch_size, seq_len, generator)
    signals, model_config = measure(module.model, batch), module.model_config
    if source is not None:  # what can be predicted is how weights fare that were drawn
        return Report(model_config, source.absolute().name, signals, None)
    return Report(model_config, init_name(model_config), signals, predict_model(module.model, seq_len))


def _module(config: DictConfig, source: Path | None) -> Any:
    """Return the module of a configuration, for its data as they are configured, of which nothing is read.

    What only reading them would tell is assumed; what weights to start from say comes before either.
    """
    node = config.module
    kind: Any = import_target("module._target_", node["_target_"])
    assumed = kind.assumed(OmegaConf.to_container(node, resolve=True))
    data: Any = import_target("data._target_", config.data["_target_"])
    fields = {name: config.data.get(name, getattr(data, name, None)) for name in assumed}
    configured = {name: value for name, value in fields.items() if type(value) is int}  # a property is none
    said = {} if source is None else data_of(source, assumed)
    return build(config, "module", **{**assumed, **configured, **said})


def make_table(result: Report, all_rows: bool) -> Table:
    """Make one row a block; of many blocks about NUM_ROWS, evenly spaced, the first and the last among them."""
    table = Table(title=result.title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("block", justify="right")
    for name, header in COLUMNS.items():
        table.add_column(header, justify="right")
        if result.predicted(name) is not None:
            table.add_column("theory", justify="right", style="dim")
    num_blocks = len(result.signals)
    rows = min(num_blocks, num_blocks if all_rows else NUM_ROWS)
    for index in sorted({round(i * (num_blocks - 1) / max(rows - 1, 1)) for i in range(rows)}):
        cells = []
        for name in COLUMNS:
            cells.append(f"{getattr(result.signals[index], name):.3g}")
            predicted = result.predicted(name)
            cells += [] if predicted is None else [f"{predicted[index]:.3g}"]
        table.add_row(str(index + 1), *cells)
    return table


def summary(result: Report) -> str:
    """Return the gradient norm of the hidden state after the first block over that after the last, in one line."""
    line = f"Hidden gradient, first block over last: {gradient_ratio(result):.3g}"
    if result.predictions is None:
        return f"{line}. No theory for this model."
    first = result.predictions[0]
    return f"{line}; theory {first.hidden_gradient:.3g}, through the skip path alone {first.skip_gradient:.3g}."


def gradient_ratio(result: Report) -> float:
    """Return the gradient norm of the hidden state after the first block over that after the last."""
    last = result.signals[-1].hidden_gradient
    return result.signals[0].hidden_gradient / last if last else float("nan")


def draw(result: Report, output: Path) -> None:
    """Draw every column against depth: measured as lines, predicted dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "variance of the hidden state": ("variance",),
        "variance of the branches over it": ("attn_ratio", "ffn_ratio"),
        "gradient norm of the hidden state": ("hidden_gradient",),
        "gradient norm of the parameters": ("attn_gradient", "ffn_gradient"),
        "mean cosine similarity of tokens": ("cosine",),
        "effective rank": ("effective_rank",),
    }
    figure, grid = plt.subplots(2, 3, figsize=(12, 6.5), sharex=True, layout="constrained")
    blocks = [signal.block for signal in result.signals]
    for axes, (title, fields) in zip(grid.flat, panels.items(), strict=True):
        for name in fields:
            part = name.split("_")[0] + ", " if len(fields) > 1 else ""
            (line,) = axes.plot(blocks, [asdict(signal)[name] for signal in result.signals], label=f"{part}measured")
            predicted = result.predicted(name)
            if predicted is not None:
                axes.plot(blocks, predicted, "--", color=line.get_color(), alpha=0.6, label=f"{part}theory")
        axes.set(title=title, yscale="linear" if fields[0] in ("cosine", "effective_rank") else "log")
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in grid[-1]:
        axes.set_xlabel("block")
    figure.suptitle(result.title)
    save_picture(figure, output, dpi=110)
    plt.close(figure)


def placements_table(overrides: Sequence[str]) -> str:
    """Return Markdown with one row for every placement of the registry, otherwise under the same overrides.

    Variance, cosine and effective rank are the last block's. The two gradient columns are the hidden state's, first
    block over last, and attention's parameters' over the FFN's, l2 norms over all blocks.
    """
    lines = [
        "| placement | init | variance | attn/stream, last | ffn/stream, last "
        "| hidden gradient, first/last | attn/ffn gradient | cosine | effective rank |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in PLACEMENTS:
        result = report([*overrides, f"model.placement={name}"])
        last = result.signals[-1]
        attn, ffn = (sum(getattr(s, f"{b}_gradient") ** 2 for s in result.signals) ** 0.5 for b in ("attn", "ffn"))
        ratio = attn / ffn if ffn else float("nan")
        figures = (last.variance, last.attn_ratio, last.ffn_ratio, gradient_ratio(result), ratio, last.cosine)
        cells = [f"{figure:.3g}" for figure in (*figures, last.effective_rank)]
        lines.append(f"| {' | '.join([name, result.init, *cells])} |")
    return "\n".join(lines)


@cli.tool
def main(config: PropagationConfig) -> None:
    # With a thread for every core of a busy machine, products this small spend their time waiting for each other.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    check_picture(config.output)
    if config.every_placement:
        print(placements_table(config.overrides))
        return
    result = report(config.overrides)
    console = Console()
    Console(width=max(console.width, 124)).print(make_table(result, config.all_rows))
    print(summary(result))
    model = result.config
    name = f"{model.placement}-{model.ffn}-{result.init}-{model.num_layers}x{model.dim}.png"
    output = config.output or PICTURES / name
    draw(result, output)
    print(f"Picture: {output}")


if __name__ == "__main__":
    cli.run(main)
