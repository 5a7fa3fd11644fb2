"""The coordinate check of Tensor Programs V (2203.03466, appendix D.1): do sizes depend on width, or on depth?

    python -m tools.coordinate_check
    python -m tools.coordinate_check ffn=moe output=widths.png
    python -m tools.coordinate_check axis=depth

Trains the same model at several widths for a few Adam steps on one batch, with optim.width_scaling none and mup, and
prints, for the logits and the last block's output, the root mean square size and that of its change since step 0. With
mup both stay where they are as the width grows; without, the change grows with it: the logits' in every step, the
output's in the first, after which the final norm bounds it. Over depth likewise, with optim.depth_scaling none and
completep (2505.01618, figure 7).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from core import cli
from core.errors import require
from lightning_modules.config import ModelConfig, MoEConfig, OptimConfig
from lightning_modules.depth_scaling import depth_scaling
from lightning_modules.initialization import initialize
from lightning_modules.optimizers import make_optimizer
from lightning_modules.transformer import Transformer
from lightning_modules.width_scaling import width_scaling
from tools.picture import check_picture, save_picture

WIDTHS = (64, 128, 256, 512, 1024)
DEPTHS = (2, 4, 8, 16, 32)
SCALINGS = {"width": ("none", "mup"), "depth": ("none", "completep")}
STEPS = (1, 5, 10)
HEAD_DIM = 32
VOCAB_SIZE = 64


@dataclass(frozen=True)
class CoordinateCheckConfig:
    """Holds the fields that `python -m tools.coordinate_check` takes.

    Attributes:
        ffn: the kind of FFN in the blocks.
        axis: what the models differ in: width, or depth.
        lr: the learning rate of the smallest one.
        output: the picture that is drawn; null: none.
    """

    ffn: Literal["dense", "moe"] = "dense"
    axis: Literal["width", "depth"] = "width"
    lr: float = 3e-3
    output: Path | None = None

    def __post_init__(self) -> None:
        require(0 <= self.lr < math.inf, "lr", self.lr, "a number >= 0")


class Size(NamedTuple):
    """Root mean square of one activation of one model after one number of steps.

    Attributes:
        size: the model's width or depth.
    """

    scaling: str
    size: int
    step: int
    name: str  # logits or hidden
    activation: float
    update: float  # of its change since step 0


def sizes_at(model_config: ModelConfig, optim_config: OptimConfig, seed: int = 0, axis: str = "width") -> list[Size]:
    """Train one model on one batch of random tokens and measure it after each of STEPS."""
    torch.manual_seed(seed)
    scaling, depth = width_scaling(model_config, optim_config), depth_scaling(model_config, optim_config)
    model = Transformer(model_config, VOCAB_SIZE, scaling.output_multiplier, depth.branch_multiplier)
    initialize(model, scaling, depth.num_layers)
    kind = getattr(optim_config, f"{axis}_scaling")
    number = model_config.dim if axis == "width" else model_config.num_layers
    optimizer = make_optimizer(model, optim_config)
    tokens = torch.randint(VOCAB_SIZE, (4, 33), generator=torch.Generator().manual_seed(seed))
    hidden: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: hidden.append(output[0].detach()))
    start: dict[str, Tensor] = {}
    sizes = []
    for step in range(max(STEPS) + 1):
        logits, router_stats = model(tokens[:, :-1])
        current = {"logits": logits.detach(), "hidden": hidden.pop()}
        start = start or current
        if step in STEPS:
            for name, value in current.items():
                size, change = (x.float().square().mean().sqrt().item() for x in (value, value - start[name]))
                sizes.append(Size(kind, number, step, name, size, change))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss = loss + 0.01 * sum(stats.load_balancing_loss for stats in router_stats)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sizes


def check(ffn: str, widths: tuple[int, ...] = WIDTHS, lr: float = 3e-3) -> list[Size]:
    """Return the sizes at every width, with and without mup; two PreNorm blocks of heads of constant width."""
    sizes = []
    for kind in SCALINGS["width"]:
        optim = OptimConfig(lr=lr, width_scaling=kind, base_width=widths[0], warmup_steps=0)
        for width in widths:
            sizes += sizes_at(_prenorm(ffn, 2, width), optim)
    return sizes


def check_depth(
    ffn: str,
    depths: tuple[int, ...] = DEPTHS,
    lr: float = 3e-3,
    dim: int = WIDTHS[0],
    placement: str = "prenorm",
) -> list[Size]:
    """Return the sizes at every depth, with and without CompleteP; one placement of one width."""
    sizes = []
    for kind in SCALINGS["depth"]:
        optim = OptimConfig(lr=lr, depth_scaling=kind, base_num_layers=depths[0], warmup_steps=0)
        for depth in depths:
            model = replace(_prenorm(ffn, depth, dim), placement=placement)
            sizes += sizes_at(model, optim, axis="depth")
    return sizes


def _prenorm(ffn: str, num_layers: int, dim: int) -> ModelConfig:
    """Return a PreNorm model of heads of constant width."""
    return ModelConfig(
        placement="prenorm",
        init="megatron",
        num_layers=num_layers,
        dim=dim,
        num_heads=dim // HEAD_DIM,
        ffn=ffn,
        moe=MoEConfig(num_experts=4),
    )


def spread(sizes: list[Size], scaling: str, step: int, name: str, field: str) -> float:
    """Return the largest over the smallest size among the widths or depths."""
    values = [getattr(s, field) for s in sizes if (s.scaling, s.step, s.name) == (scaling, step, name)]
    return max(values) / min(values)


def print_table(sizes: list[Size], axis: str = "width") -> None:
    """Print one row for each scaling, quantity and step: the size of each model, and the spread among them."""
    models = sorted({size.size for size in sizes})
    table = Table(title=f"Root mean square size by {axis}")
    for column in ("scaling", "what", "step", *map(str, models), "max / min"):
        table.add_column(column, justify="right")
    for kind in SCALINGS[axis]:
        for name in ("hidden", "logits"):
            for field in ("activation", "update"):
                for step in STEPS:
                    values = [getattr(s, field) for s in sizes if (s.scaling, s.name, s.step) == (kind, name, step)]
                    cells = (f"{value:.3g}" for value in values)
                    table.add_row(kind, f"{name} {field}", str(step), *cells, f"{max(values) / min(values):.2f}")
    Console(width=None if Console().is_terminal else 120).print(table)


def draw(sizes: list[Size], output: Path, axis: str = "width") -> None:
    """Update sizes against width or depth, one line a step; left without scaling, right with it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(9, 7), sharex=True, sharey="row", layout="constrained")
    for row, name in zip(grid, ("hidden", "logits"), strict=True):
        for axes, kind in zip(row, SCALINGS[axis], strict=True):
            for step in STEPS:
                points = [(s.size, s.update) for s in sizes if (s.scaling, s.name, s.step) == (kind, name, step)]
                axes.plot(*zip(*points, strict=True), "o-", label=f"step {step}")
            field = "model.dim" if axis == "width" else "model.num_layers"
            axes.set(xscale="log", yscale="log", title=f"{name}, optim.{axis}_scaling={kind}", xlabel=field)
            axes.set_ylabel("change since step 0 (rms)")
            axes.grid(alpha=0.3)
            axes.legend()
    save_picture(figure, output, dpi=110)
    plt.close(figure)


@cli.tool
def main(config: CoordinateCheckConfig) -> None:
    check_picture(config.output)
    sizes = (check if config.axis == "width" else check_depth)(config.ffn, lr=config.lr)
    print_table(sizes, config.axis)
    if config.output is not None:
        draw(sizes, config.output, config.axis)
        print(f"Picture: {config.output}")


if __name__ == "__main__":
    cli.run(main)
