"""Go through a recorded step again, and look at it block by block.

    python -m tools.replay RUN              the first step that the flight recorder has written out
    python -m tools.replay RUN step=137     another one
    python -m tools.replay RUN allow=my_file.MyCallback     a run with a callback of your own

Takes the newest checkpoint that leads to the step, trains on from there as the run did (its data, its random numbers,
its policy on divergence, your own callbacks), stops before the step, and sends the recorded tokens through the model.
What does not come out as it was recorded was caused by neither the weights nor the data. Writes nothing.
"""

import math
import re
import tempfile
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.plugins import Precision
from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import ConfigDict, Field
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from analysis.propagation import BlockSignal, measure
from callbacks.checkpointing.random_state import RandomState
from callbacks.divergence.divergence import Divergence
from callbacks.divergence.flight_recorder import FOLDER
from core import cli, tensor_archive
from core.atomic_write import is_whole
from core.build import build, build_all, build_module, import_target
from core.checkpoint import CheckpointIO, load_beside_weights
from core.console import silence_noise
from core.dataclass_cli import FIRST
from core.errors import UserError, one_line, require
from core.open_run import open_data
from core.printable import printable
from core.saved_config import PACKAGES, load_config
from core.untrusted import MIB, beyond, bound, parse_json, read_bytes

STEERING = {f"{kind.__module__}.{kind.__qualname__}" for kind in (RandomState, Divergence)}
"""Of this project's callbacks, those that the weights depend on."""
COLUMNS = ("variance", "attn_ratio", "ffn_ratio", "hidden_gradient", "attn_gradient", "ffn_gradient")
HEADERS = (
    "variance",
    "attn/\nstream",
    "ffn/\nstream",
    "hidden\ngrad",
    "attn\ngrad",
    "ffn\ngrad",
    "recorded:\nnot finite",
)


CATCH_UP = 10_000
"""Steps to train until the recorded one."""
EVENT_BYTES = 64 * MIB
"""Of events.jsonl, which has a few hundred a line."""


@dataclass(frozen=True)
class ReplayConfig:
    """Holds the fields that `python -m tools.replay` takes.

    Attributes:
        run: a run folder, such as runs/moe_spannorm/TIME.
        step: the recorded step to go through, counted from 1; null: the first.
        allow: what the run's configuration names, and you vouch for: classes of yours, as my_file.Mine, and addresses.
    """

    run: Path = field(metadata=FIRST)
    step: int | None = None
    allow: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """Holds what is used of a line of events.jsonl (callbacks/divergence/divergence.py)."""

    __pydantic_config__ = ConfigDict(extra="ignore")

    step: Annotated[int, Field(ge=0, le=10**15)]
    done: str


class Arrived(Exception):
    """The run stands before the step."""


class Halt(L.Callback):
    """Ends the run before a step of this number, counted from 1."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step - 1:
            raise Arrived

    def keep_beside(self, save: Callable[[Path], None]) -> None:
        """Keep nothing: no checkpoint is saved on the way, and a policy that wants its snapshots kept must not mind."""


def recorded_steps(run: Path) -> dict[int, list[Path]]:
    """Return {step: the files of all its ranks}, in order."""
    found: dict[int, list[Path]] = {}
    for path in sorted((run / FOLDER).glob("step_*_rank_*.pt")):
        match = re.fullmatch(r"step_(\d+)_rank_\d+\.pt", path.name)
        if match and path.is_file():
            found.setdefault(int(match[1]), []).append(path)
    return dict(sorted(found.items()))


def checkpoint_before(run: Path, step: int) -> tuple[Path | None, int]:
    """Return (the newest checkpoint that leads to the step, its step); (None, 0): only the beginning is left.

    One from between a snapshot and the rollback to it does not: a run from there cannot go back so far.
    """
    steps = {}
    for path in filter(is_whole, (run / "checkpoints").glob("*.ckpt")):
        at = load_beside_weights(path)["global_step"]
        require(type(at) is int and at >= 0, f"{path}: global_step", at, "an integer >= 0")
        steps[path] = at
    undone = [range(snapshot + 1, at) for at, snapshot in rollbacks(run) if at < step]
    usable = {path: at for path, at in steps.items() if at < step and not any(at in span for span in undone)}
    newest = max(usable, key=lambda path: usable[path], default=None)
    return newest, usable[newest] if newest else 0


def rollbacks(run: Path) -> list[tuple[int, int]]:
    """Return (step of the event, step of the snapshot that it went back to) of each rollback."""
    log = run / "events.jsonl"
    lines = read_bytes(log, EVENT_BYTES).splitlines() if log.exists() else []
    events: list[Event] = [
        parse_json(line, f"{log}, line {number}", Event) for number, line in enumerate(lines, start=1)
    ]
    found = [(event.step, re.match(r"rolled back to step (\d{1,15})\b", event.done)) for event in events]
    return [(step, int(match[1])) for step, match in found if match]


def check_distance(config: DictConfig, step: int, at: int, records: Collection[dict[str, Any]]) -> None:
    """Refuse a step that the run has never come to, or that is too far to train to: a file's name may say any.

    Args:
        config: the run's.
        step: recorded, by the names of its files.
        at: step of the checkpoint to start from.
        records: what the files hold.

    Raises:
        UserError: says which.
    """
    of_it = all(record["step"] == step for record in records)
    require(
        of_it, "step", step, f"a step whose record is of that step; it says {[record['step'] for record in records]}"
    )
    length = config.trainer.get("max_steps")
    known = type(length) is int and length >= 0
    require(not known or step <= length, "step", step, f"at most {length}, trainer.max_steps of its config.yaml")
    if step - 1 - at > bound(CATCH_UP):
        what = f"step {step} is {step - 1 - at:,} steps behind the newest checkpoint that leads to it"
        raise UserError(beyond(what, CATCH_UP))


def load_record(path: Path) -> dict[str, Any]:
    """Return what the flight recorder wrote; see callbacks/divergence/flight_recorder.py.

    Raises:
        UserError: it is not whole, or no such record: says what is wrong.
    """
    try:
        content = tensor_archive.load(path)
        _check_record(content)
    except Exception as error:  # of torch's, pickle's and zipfile's many kinds
        raise UserError(f"{path} cannot be read as a recorded step: {one_line(error)}") from error
    return content


def _check_record(content: Any) -> None:
    """Raise ValueError unless it has what a record has, of the types that it has them."""
    kinds = {"reason": str, "step": int, "world_size": int, "batches": list, "steps": list, "groups": list}
    if not isinstance(content, dict) or any(type(content.get(name)) is not kind for name, kind in kinds.items()):
        raise ValueError(f"expected {', '.join(f'{name}: {kind.__name__}' for name, kind in kinds.items())}")
    samples = content.get("samples")
    if samples is not None and not (isinstance(samples, list) and [type(part) for part in samples] == [int, int]):
        raise ValueError("samples is neither null nor two integers")
    for batch in content["batches"]:
        if not isinstance(batch, dict) or not batch or not all(isinstance(part, Tensor) for part in batch.values()):
            raise ValueError("a batch is no dictionary of tensors")
    for step in content["steps"]:
        known = isinstance(step, dict) and type(step.get("step")) is int and isinstance(step.get("grad_norm"), float)
        numbers = (step.get(name) for name in ("losses", "norms", "nonfinite")) if known else (None,)
        if not all(isinstance(these, list) and all(isinstance(x, float) for x in these) for these in numbers):
            raise ValueError("steps holds something else than step, losses, grad_norm, norms, nonfinite")
        if len(step["nonfinite"]) != len(content["groups"]):
            raise ValueError("a step has not one figure for each of its groups")
    if not all(isinstance(group, list) and len(group) == 2 for group in content["groups"]):
        raise ValueError("groups holds something else than [block, kind]")


def arrive(config: DictConfig, step: int, checkpoint: Path | None, scratch: Path, allow: Collection[str] = ()) -> Any:
    """Return the LightningModule as it was before the step; see `open_data` for what is allowed."""
    # Hooks see neither well, and results are the same. Of the module's own copy: a saved one has no references.
    config.module.model.compile = config.module.model.activation_checkpointing = False
    config.callbacks = {name: node for name, node in (config.callbacks or {}).items() if node and steers(node)}
    for node in config.callbacks.values():
        if "run_dir" in node:
            node.run_dir = str(scratch)
    config.trainer.update(devices=1, num_nodes=1, strategy="auto", limit_val_batches=0)
    for switch in ("enable_progress_bar", "enable_checkpointing", "enable_model_summary"):
        config.trainer[switch] = False
    L.seed_everything(config.seed, workers=True, verbose=False)
    datamodule = open_data(config, allow)
    module = build_module(config, datamodule)
    callbacks = [*build_all(config, "callbacks"), Halt(step)]
    own = {"plugins": [CheckpointIO(), *precision_plugins(config)], "logger": False, "default_root_dir": str(scratch)}
    trainer = build(config, "trainer", callbacks=callbacks, **own)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint.*")  # those left out above
            trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    except Arrived:
        return module
    raise AssertionError("the run ended before the step")


def precision_plugins(config: DictConfig) -> list[Precision]:
    """Return those of the run's plugins in whose precision it computes; the others save, or start processes."""
    nodes = config.trainer.get("plugins")
    if not isinstance(nodes, ListConfig):
        return []
    targets = {n: node.get("_target_") if isinstance(node, DictConfig) else None for n, node in enumerate(nodes)}
    classes = {n: import_target(f"trainer.plugins.{n}._target_", target) for n, target in targets.items() if target}
    kept = [n for n, plugin in classes.items() if isinstance(plugin, type) and issubclass(plugin, Precision)]
    return [instantiate(nodes[n], _convert_="all") for n in kept]


def steers(node: DictConfig) -> bool:
    """Return whether a callback may change what is learnt: a few of ours, and whatever is the user's own."""
    if not isinstance(node, DictConfig) or not isinstance(node.get("_target_"), str):
        return False
    target = node["_target_"]
    return target in STEERING or target.partition(".")[0] not in PACKAGES


def make_table(signals: list[BlockSignal], record: dict[str, Any]) -> Table:
    """Make one row a block: measured now, and the largest recorded share of gradient entries that were not finite."""
    nonfinite = of_the_step(record).get("nonfinite", [0.0] * len(record["groups"]))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("block", justify="right")
    for header in HEADERS:
        table.add_column(header, justify="right")
    for signal in signals:
        shares = [share for (block, _), share in zip(record["groups"], nonfinite, strict=True) if block == signal.block]
        cells = [f"{getattr(signal, column):.3g}" for column in COLUMNS]
        table.add_row(str(signal.block), *cells, f"{100 * max(shares, default=0.0):.3g} %")
    return table


def of_the_step(record: dict[str, Any]) -> dict[str, Any]:
    """Return the statistics of the recorded step itself; empty where an exception came before its gradients."""
    return next((step for step in record["steps"] if step["step"] == record["step"]), {})


def loss_and_norm(module: Any, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Return the step's (mean loss over its batches, auxiliary ones included, gradient norm) in the run's precision."""
    module.zero_grad()
    total = 0.0
    for batch in batches:
        with module.trainer.precision_plugin.forward_context():
            loss = module.training_step(batch, 0) / len(batches)
        loss.backward()
        total += float(loss.detach())
    return total, float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))


@cli.tool
def main(settings: ReplayConfig) -> None:
    run = settings.run
    steps = recorded_steps(run)
    require(bool(steps), "RUN", str(run), f"a run with a step in {FOLDER}/")
    step = next(iter(steps)) if settings.step is None else settings.step
    require(step in steps, "step", step, f"one of {', '.join(map(str, steps))}")
    config = load_config(run, settings.allow)
    for group in ("module.model", "data", "trainer", "callbacks"):
        valid = "a group of values, as in the configuration that a run has saved"
        require(isinstance(OmegaConf.select(config, group), DictConfig), group, OmegaConf.select(config, group), valid)
    seed = config.get("seed")
    require(type(seed) is int and 0 <= seed < 2**32, "seed", seed, "an integer in [0, 2**32)")
    records = [load_record(path) for path in steps[step]]
    checkpoint, at = checkpoint_before(run, step)
    valid = "null, or a checkpoint before the step: the run began from weights that its folder does not hold"
    require(checkpoint is not None or config.get("init_from") is None, "init_from", config.get("init_from"), valid)
    check_distance(config, step, at, records)
    samples = "samples {} to {}".format(*records[0]["samples"]) if records[0]["samples"] else "its batch"
    print(f"Step {step} of {printable(run)}, {samples}. It was recorded for this reason:")
    print(f"  {printable(records[0]['reason'], 2000)}")
    print(f"From {printable(checkpoint or 'the beginning')}, {step - 1 - at} steps to catch up with.", flush=True)
    silence_noise()
    with tempfile.TemporaryDirectory() as scratch:
        module = arrive(config, step, checkpoint, Path(scratch), settings.allow)
    report(module, records)


def report(module: Any, records: list[dict[str, Any]]) -> None:
    """Print the blocks' figures, and whether the step came out as it was recorded."""
    whole = min(len(record["batches"]) for record in records)  # one may have failed while another went on
    if len(records) < records[0]["world_size"] or any(len(record["batches"]) > whole for record in records):
        print(
            f"Of {records[0]['world_size']} processes {len(records)} left a record; {whole} batches are in all of them."
        )
    of_ranks = zip(*(record["batches"][:whole] for record in records), strict=True)
    try:
        batches = [
            {name: torch.cat([part[name] for part in parts]).to(module.device) for name in parts[0]}
            for parts in of_ranks
        ]
    except (RuntimeError, KeyError) as error:
        raise UserError(f"the recorded batches of its processes do not fit each other: {one_line(error)}") from error
    require(bool(batches), "step", records[0]["step"], "a step of which all processes have recorded a batch")
    for batch in batches:
        valid = "a step whose recorded batches are such as the model reads, its tokens in the model's vocabulary"
        require(module.model.can_read(batch), "step", records[0]["step"], valid)
    loss, norm = loss_and_norm(module, batches)  # first, with the random numbers that the step had
    module.zero_grad()
    with module.trainer.precision_plugin.forward_context():
        signals = measure(module.model, {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})
    Console().print(make_table(signals, records[0]))
    line = f"Loss {loss:.4f}, gradient norm {norm:.4g}"
    if not all(of_the_step(record) for record in records):
        print(f"{line}; recorded were none.")
        return
    losses = [loss for record in records for loss in of_the_step(record)["losses"]] or [math.nan]
    then = (sum(losses) / len(losses), of_the_step(records[0])["grad_norm"])
    pairs = zip(then, (loss, norm), strict=True)
    same = all(math.isclose(old, new, rel_tol=1e-3) or (old != old and new != new) for old, new in pairs)
    verdict = "the same" if same else "not the same, so look beyond the step's weights and data"
    print(f"{line}; recorded {then[0]:.4f} and {then[1]:.4g}: {verdict}.")


if __name__ == "__main__":
    cli.run(main)
