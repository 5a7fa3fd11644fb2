"""Measures how large a batch may be before tokens are wasted, by training on from a checkpoint with several sizes."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from analysis.anatomy.findings import Curve, Findings, Picture
from analysis.anatomy.forward import target_losses
from analysis.anatomy.held_out import Batch, HeldOut, Tally
from analysis.anatomy.measure import Measure, require_fitting
from core.checkpoint import load
from core.errors import require
from core.open_run import OpenRun
from core.options import accepts
from lightning_modules.optim import restore
from lightning_modules.optimizers import make_optimizer
from lightning_modules.trunk import Trunk

MIN_STEPS = 8
"""A batch of which a branch has fewer steps is not tried."""


@dataclass(frozen=True)
class Branching:
    """Holds what a run trains with, beside its weights.

    Attributes:
        module: its LightningModule, which knows the loss and the optimizer.
        state: of the optimizer, as a checkpoint of one file has it.
        step: optimizer steps that the checkpoint has done.
        checkpoint: its path.
        samples: of one optimizer step.
        clip: the gradient norm that is clipped at; None: none is.
        by_value: whether it is each entry of the gradient that is clipped there instead.
    """

    module: Any
    state: dict[str, Any]
    step: int
    checkpoint: Path
    samples: int
    clip: float | None
    by_value: bool = False

    @property
    def lr(self) -> float:
        """Return the learning rate of the next step."""
        return float(self.state["param_groups"][0]["lr"])

    def optimizer(self, module: Any) -> torch.optim.Optimizer:
        """Return the optimizer of a copy of the module, which goes on from the checkpoint.

        Raises:
            ConfigError: what the checkpoint keeps of it is not what this run would have kept.
        """
        made = make_optimizer(module.model, module.optim_config)
        restore(made, module.optim_config, self.state, self.step, "checkpoint", self.checkpoint)
        return made

    def train(
        self,
        model: Trunk,
        rows: dict[str, Tensor],
        size: int,
        factor: float,
        at_once: int,
        watch: Callable[[], None] = lambda: None,
    ) -> Trunk:
        """Return a copy of a model after training on data, in their order; the last batch has to be a whole one.

        Args:
            model: where the branch begins.
            rows: of all samples, as a DataModule has them.
            size: samples of one optimizer step.
            factor: on the learning rate, which stays what it then is.
            at_once: as many samples are taken side by side; the gradients of a step are added up.
            watch: called after each step.
        """
        module = copy.deepcopy(self.module).train()
        module.model.load_state_dict(model.state_dict())
        optimizer = self.optimizer(module)
        for group in optimizer.param_groups:
            group["lr"] *= factor
        for number in range(_length(rows) // size):
            stop = (number + 1) * size
            for start in range(number * size, stop, at_once):
                part = slice(start, min(start + at_once, stop))
                share = (part.stop - part.start) / size
                batch = {name: values[part].to(module.device) for name, values in rows.items()}
                (share * module.training_step(batch, number)).backward()
            if self.clip:
                clip = torch.nn.utils.clip_grad_value_ if self.by_value else torch.nn.utils.clip_grad_norm_
                clip(module.parameters(), self.clip)
            module.on_before_optimizer_step(optimizer)  # moves the routers' biases
            optimizer.step()
            optimizer.zero_grad()
            watch()
        trained: Trunk = module.model.eval()
        return trained


@dataclass(frozen=True)
class CriticalBatchSize(Measure):
    """Measures the critical batch size by branches of training from the checkpoint (2505.23971).

    Each branch takes weights and optimizer as they are, goes through the same part of the training split (that which
    there is for fitting) in batches of 2^n times the run's, at a constant rate, the checkpoint's times sqrt(2^n), and
    is then measured on held-out data. The critical size is the largest one up to which no branch's loss is more than
    `tolerance` above the least of the smaller sizes'. (2410.21676 asks how this number scales, and takes whole runs for
    it: the size that needs 20 % more tokens.)

    | name | what |
    |---|---|
    | critical_batch_size | in sequences, or images; the largest size that was tried, where none is too large |
    | branch_loss_by_doubling | held-out loss after the branch, by n; n = 0 is the run's own batch |

    A checkpoint from before the rate's decay says more than the last one, whose rate is small. Short branches pay for
    the change of rate and batch: the more tokens for fitting, the better.

    Attributes:
        least, most: n of the smallest and largest batch.
        tolerance: nats per target.
        branching: what is trained on with; None: there is nothing to measure.
    """

    name: ClassVar[str] = "critical_batch_size"
    about: ClassVar[str] = "the largest batch that wastes no tokens, by branches of training"
    outcomes: ClassVar[tuple[str, ...]] = ("critical_batch_size",)
    slow: ClassVar[bool] = True

    least: int = -1
    most: int = 5
    tolerance: float = 0.01
    branching: Branching | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.least <= 0, "least", self.least, "an integer <= 0: the run's own batch is among those tried")
        require(self.most >= 0, "most", self.most, "an integer >= 0: the run's own batch is among those tried")
        require(0 <= self.tolerance < math.inf, "tolerance", self.tolerance, "a number >= 0")

    def of_run(self, run: OpenRun) -> Self:
        """Return the measure with what the run trains with, where its checkpoint is one file."""
        states = load(run.checkpoint).get("optimizer_states")
        if not states:
            return self
        trainer, batch_size = run.config.get("trainer") or {}, run.config.data.batch_size
        accumulated, clip = trainer.get("accumulate_grad_batches", 1), trainer.get("gradient_clip_val")
        for name, value in (("data.batch_size", batch_size), ("trainer.accumulate_grad_batches", accumulated)):
            require(accepts(int, value) and value >= 1, name, value, "an integer >= 1")
        fits = accepts(float | None, clip) and 0 <= (clip or 0) < math.inf
        require(fits, "trainer.gradient_clip_val", clip, "a number >= 0, or null")
        by_value = trainer.get("gradient_clip_algorithm") == "value"
        sequences = batch_size * accumulated
        branching = Branching(run.module, states[0], run.step, run.checkpoint, sequences, clip, by_value)
        branching.optimizer(run.module)  # is refused here or never: a branch may take long
        return replace(self, branching=branching)

    def lacks(self, model: Trunk) -> str | None:
        """Say that there is nothing to train with, or that nothing would move."""
        if self.branching is None:
            return "its checkpoint is not one file with the state of an optimizer"
        return None if self.branching.lr > 0 else "its learning rate has come to 0"

    def fitting_samples(self) -> int:
        """Return those of the fewest steps with the run's own batch."""
        return 0 if self.branching is None else MIN_STEPS * self.branching.samples

    def __call__(self, model: Trunk, data: HeldOut) -> Findings:
        assert self.branching is not None, "what `lacks` says"
        rows, own = _joined(data.fitting), self.branching.samples
        sizes = {n: int(own * 2.0**n) for n in range(self.least, self.most + 1)}
        count = _length(rows)
        tried = {n: size for n, size in sizes.items() if size >= 1 and count // size >= MIN_STEPS}
        require_fitting(self.name, self.fitting_samples(), count, data.num_positions)
        # All branches go through the same tokens, in whole batches of each.
        used = count - count % max(tried.values())
        rows = {name: values[:used] for name, values in rows.items()}
        tally = Tally(data, len(tried))
        for row, (n, size) in enumerate(tried.items()):
            at_once, factor = data.batches[0].num_samples, math.sqrt(2.0**n)
            with torch.random.fork_rng():  # a router's jitter
                torch.manual_seed(0)
                branch = self.branching.train(model, rows, size, factor, at_once, data.watch)
            with torch.inference_mode():
                for batch in data:
                    tally.add(row, batch, target_losses(branch, batch))
        losses = (tally.sums.sum(1) / data.num_targets).tolist()
        found = list(tried.values())[critical(losses, self.tolerance)]
        seen = (
            f"Each branch went through {model.count(rows).units:,} {data.task.counted}, in batches of "
            f"{', '.join(map(str, tried.values()))} {data.task.sample}s; the run's own are of {own}."
        )
        largest = ("None of the batches was too large: the critical one is larger still.",)
        return Findings(
            scalars={"critical_batch_size": float(found)},
            curves={"branch_loss_by_doubling": Curve(losses, "doublings of the batch", min(tried))},
            by_document={"branch_loss_by_doubling": tally.sums},
            pictures=(
                Picture("branch_loss", "curves", ("branch_loss_by_doubling",), "held-out loss after the branch (nats)"),
            ),
            notes=(seen, *(largest if found == max(tried.values()) else ())),
        )


def _joined(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the rows of all batches, as a DataModule would give them."""
    return Batch.joined(batches).rows if batches else {}


def _length(rows: dict[str, Tensor]) -> int:
    return min((len(values) for values in rows.values()), default=0)


def critical(losses: Sequence[float], tolerance: float) -> int:
    """Return the place of the largest size up to which no loss is more than `tolerance` above the least before it."""
    for place in range(1, len(losses)):
        if not losses[place] <= min(losses[:place]) + tolerance:
            return place - 1
    return len(losses) - 1
