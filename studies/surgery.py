"""Start a trained model's weights under other placements: the loss right after, and after some steps of recovery.

    python -m studies.surgery runs/mine
    python -m studies.surgery runs/mine placements=sandwich,rezero,prenorm:gpas=true steps=200 output=results/surgery

Every placement takes over the matrices, and the norms that it has in common with the run's; the rest starts as its init
says. One that has its record in the output's folder already is not tried again. table.md has a row for each.
"""

import json
import math
import re
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import cli
from core.atomic_write import write_whole
from core.dataclass_cli import FIRST
from core.errors import ConfigError, one_line, require
from core.printable import printable
from core.untrusted import parse_yaml, read_json
from spannorm import PLACEMENTS

if TYPE_CHECKING:
    from omegaconf import DictConfig

MAX_RECORDS = 1000


@dataclass(frozen=True)
class SurgeryConfig:
    """Holds the fields that `python -m studies.surgery` takes.

    Attributes:
        run: a run folder, whose last weights are the start.
        placements: each a name with options of its own, as prenorm:gpas=true or mixln:gpas=true:post_fraction=0.5;
            none: all that there are, by their defaults.
        steps: of recovery.
        lr: the learning rate of the recovery, warmed up over its first tenth.
        output: the folder of the records and the table.
        seed: of what starts anew, and of the order of the data.
    """

    run: Path = field(metadata=FIRST)
    placements: tuple[str, ...] = ()
    steps: int = 200
    lr: float = 1e-3
    output: Path = Path("results/surgery")
    seed: int = 1

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "an integer >= 1")
        require(0 < self.lr < math.inf, "lr", self.lr, "a number > 0")
        require(0 <= self.seed < 2**32, "seed", self.seed, "an integer in [0, 2**32)")


@dataclass(frozen=True)
class Taken:
    """Says what became of one placement.

    Attributes:
        placement: with its options.
        before: validation loss of the run's own weights under its own placement, nats per token.
        right_after: under the new placement, before any step.
        recovered: after the steps.
        steps: how many.
        lr: their learning rate.
        new, unused: how many parameters started anew, and how many tensors were not taken.
        seed: of what starts anew, and of the order of the data; None in older records.
    """

    placement: str
    before: float
    right_after: float
    recovered: float
    steps: int
    lr: float
    new: int
    unused: int
    seed: int | None = None


def parse(placement: str) -> tuple[str, dict[str, Any]]:
    """Return a placement's name and options, from NAME:OPTION=VALUE:OPTION=VALUE."""
    name, *options = placement.split(":")
    pairs = [option.partition("=") for option in options]
    valid = "a placement's name, or with options as prenorm:gpas=true"
    require(all(separator for _, separator, _ in pairs), "placements", placement, valid)
    return name, {option: parse_yaml(value, "placements") for option, _, value in pairs}


def try_placement(config: "DictConfig", run: Path, chosen: SurgeryConfig, placement: str, before: float) -> Taken:
    """Start the run's weights under a placement, validate, train the steps, and validate again.

    Args:
        config: the run's, which is altered.
        run: its folder.
        chosen: steps, rate and seed.
        placement: with its options.
        before: validation loss of the run as it is.

    Raises:
        ConfigError: the placement is none, or refuses the run's norms.
    """
    import lightning as L

    from core.build import build_module
    from core.open_run import open_data

    config.module.model.placement, config.module.model.placement_options = parse(placement)
    config.module.model.init, config.module.model.init_options = "default", {}
    config.module.optim.lr, config.module.optim.warmup_steps = chosen.lr, chosen.steps // 10
    config.data.seed = chosen.seed
    L.seed_everything(chosen.seed, verbose=False)
    datamodule = open_data(config)
    datamodule.prepare_data()
    module = build_module(config, datamodule)
    start = module.start_from(run)
    right_after = validate(module, datamodule)
    trainer = L.Trainer(
        max_steps=chosen.steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        val_check_interval=chosen.steps,
        check_val_every_n_epoch=None,
        **QUIET,
    )
    trainer.fit(module, datamodule=datamodule)
    recovered = validate(module, datamodule)
    counts = len(start.new), len(start.unused)
    return Taken(placement, before, right_after, recovered, chosen.steps, chosen.lr, *counts, chosen.seed)


QUIET: dict[str, Any] = {
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def validate(module: Any, datamodule: Any) -> float:
    """Return the validation loss in nats per token."""
    import lightning as L

    (metrics,) = L.Trainer(**QUIET).validate(module, datamodule=datamodule, verbose=False)
    return float(metrics["val/loss"])


def _check_same(taken: Taken, chosen: SurgeryConfig, before: float, path: Path) -> None:
    """Refuse a record of other steps, another rate, seed or run, which would stand in the same table.

    Raises:
        ConfigError: names the record.
    """
    same = (taken.steps, taken.lr) == (chosen.steps, chosen.lr) and math.isclose(taken.before, before, rel_tol=1e-4)
    told = f"{path.name} has {taken.steps} steps at {taken.lr:g}, from a loss of {taken.before:.4f}, seed {taken.seed}"
    valid = (
        f"a folder whose records are of this run, {chosen.steps} steps, lr={chosen.lr:g} and seed={chosen.seed}: {told}"
    )
    require(same and taken.seed in (None, chosen.seed), "output", str(chosen.output), valid)


def write_table(output: Path) -> Path:
    """Write a row for each record of the folder, the smallest loss right after first, and return the path."""
    paths = sorted(output.glob("*.json"))[:MAX_RECORDS]
    records = sorted((read_json(path, Taken) for path in paths), key=lambda taken: taken.right_after)
    lines = [
        "| placement | right after | recovered | steps, rate | parameters that start anew | tensors not taken |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {printable(taken.placement)} | {taken.right_after:.3f} | {taken.recovered:.3f} | {taken.steps}, "
        f"{taken.lr:g} | {taken.new} | {taken.unused} |"
        for taken in records
    ]
    befores = sorted({f"{taken.before:.3f}" for taken in records})
    text = f"The run itself: {', '.join(befores)}. Validation loss in nats per token.\n\n" + "\n".join(lines) + "\n"
    path = output / "table.md"
    write_whole(path, lambda unfinished: unfinished.write_text(text))
    return path


@cli.tool
def main(config: SurgeryConfig) -> None:
    from core.console import silence_noise
    from core.open_run import open_run
    from core.saved_config import load_config

    silence_noise()
    opened = open_run(config.run)
    opened.datamodule.prepare_data()
    before = validate(opened.module, opened.datamodule)
    for placement in config.placements or tuple(PLACEMENTS):
        path = config.output / f"{re.sub(r'[^a-zA-Z0-9_.-]+', '_', placement)}.json"
        if path.exists():
            _check_same(read_json(path, Taken), config, before, path)
            print(f"{printable(placement)}: has its record", flush=True)
            continue
        try:
            taken = try_placement(load_config(config.run), config.run, config, placement, before)
        except ConfigError as error:
            if config.placements:
                raise
            print(f"{printable(placement)}: left out ({printable(one_line(error))})", flush=True)
            continue
        write_whole(path, partial(Path.write_text, data=json.dumps(asdict(taken), indent=2) + "\n"))
        print(f"{printable(placement)}: {before:.3f} -> {taken.right_after:.3f} -> {taken.recovered:.3f}", flush=True)
    print(f"Table: {printable(write_table(config.output), limit=None)}")


if __name__ == "__main__":
    cli.run(main)
