"""Keeps what a study needs of a run: a few kilobytes that say how it went, and whether training failed."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

from core.atomic_write import write_whole
from core.event_files import has_curves
from core.status import EARLY, MAX_WORD, PROVENANCE
from core.status import read as read_status
from core.task import LOSS, NATS_PER_TOKEN
from core.untrusted import MIB, Untrusted, read_json
from studies.decay import Decay
from studies.grid import Label, Override, Planned, Seed
from tools.compare import LATE, Run
from tools.stability import MAX_BLOCKS

FINISHED, SPIKING, SLOW, SHORT = "finished", "spiking", "slow", "short"
COLLAPSED, DIVERGED, BROKEN = "collapsed", "diverged", "broken"
FAILURES = {
    DIVERGED: "the loss is no finite number at the end, or the training loss of the last tenth is above that of the "
    "best tenth before it by more than 10 %, and by more than a tenth of what had been learned: the distance from "
    "there to the loss of the frequencies of what is predicted",
    COLLAPSED: "the final validation loss is nearer to that of counted tokens than to that of counted pairs: the model "
    "uses hardly anything of the context; where no pairs are counted, as of images, it is not below that of the "
    "frequencies of what is predicted",
    BROKEN: "the process ended before the last step",
}
"""When training has failed, in the order in which it is looked at."""
BLEMISHES = {
    SLOW: "the final validation loss is not below that of counted pairs, and nearer to it than to that of counted "
    "tokens: the model learns, and has not learned much in so few steps",
    SPIKING: "more than one in a hundred steps is a spike (analysis/stability.py)",
    SHORT: "a callback ended it before the last step, as EarlyStopping does: its loss is that of fewer steps",
}
"""What is said of a run that has ended with a loss like any other."""
STATUSES = (FINISHED, *FAILURES, *BLEMISHES)
FORMER_STATUSES = {"no number": DIVERGED, "rose": DIVERGED, "unlearned": SLOW}
"""Of records that were written before the two were told apart."""
RISE = 0.1
MANY_SPIKES = 100
"""In 10,000 steps."""
BY_BLOCK = (
    "gradients/block_{}/all",
    "signal/block_{}/variance",
    "signal/block_{}/attn_ratio",
    "signal/block_{}/ffn_ratio",
    "signal/block_{}/max",
    "signal/block_{}/variance_theory",
    "representation/block_{}/token_cosine",
    "representation/block_{}/effective_rank",
    "representation/block_{}/block_cosine",
)
MAX_POINTS, MAX_TIMES = 60, 4
DIGITS = 5
MAX_BYTES = 4 * MIB
"""Of a record's file; those of this project have a few kilobytes."""


def _known(status: str) -> str:
    status = FORMER_STATUSES.get(status, status)
    if status not in STATUSES:
        raise ValueError(f"expected one of {', '.join(STATUSES)}")
    return status


# What a record's file may hold. A loss may be no number, which JSON of this project writes as NaN.
Amount = Annotated[float, Field(ge=0, le=1e15)]
Loss = Annotated[float, Field(ge=-1e9, le=1e9)]
MOST_OUTCOME = 1e15
Outcome = Annotated[float, Field(ge=-MOST_OUTCOME, le=MOST_OUTCOME)]
Tag = Annotated[str, Field(pattern=r"^[a-z0-9_{}/.-]+$", max_length=200)]
StepText = Annotated[str, Field(pattern=r"^[0-9]{1,15}$")]
BlockText = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,3}$")]


@dataclass(frozen=True)
class Record:
    """One run of a study.

    Attributes:
        name, point, seed, overrides: as planned.
        status: finished, or what else it came to: FAILURES, BLEMISHES.
        reason: of a broken run, the last line it said; of one that was stopped early, why.
        folder: the run's.
        val_loss: at the end; None where it is no number.
        loss_unit: that of all losses.
        figures: what else the run's task measures of held-out data (core.task.Task.figures), at the end, by name; None
            where it is no number.
        main: the one of them that runs are compared by, of which more is better; or loss.
        bigram_loss, unigram_loss: of the corpus; None where they are not known.
        parameters: of the model.
        seconds: of training, over all processes that the run has taken.
        tokens_per_second: mean of the process that trained last; None of a run that counts images.
        train_loss: (steps, losses), each the mean since the one before; at most MAX_POINTS.
        by_block: {tag with {} for the block: {step: {block: value}}}, at MAX_TIMES of each monitor's steps.
        decay: of the gradient at initialization; None: not measured.
        first_loss: of the first step's training batch.
        spikes: per 10,000 steps; None of a run too short to say, or not logged at every step.
        grad_norm_p999: 99.9th percentile of the gradient norm before clipping.
        clipped: share of the steps whose gradient was clipped; None without clipping by the norm.
        largest_activation: magnitude in any block's hidden state, at the steps when it was looked at; infinite where
            one was no finite number, None too in older records of such a run.
        outcomes: what was measured of the finished model, by name: analysis.anatomy.registry.outcomes. None: it was no
            finite number, too large a one, or its model has nothing of the kind.
        provenance: commit, versions, machine and corpus, as core/provenance.py has them; empty in older records.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=255)]
    point: Annotated[dict[Label, Label], Field(max_length=16)]
    seed: Seed
    overrides: Annotated[list[Override], Field(max_length=1000)]
    status: Annotated[str, AfterValidator(_known)]
    folder: Annotated[str, Field(max_length=4096)]
    reason: Annotated[str, Field(max_length=100_000)] = ""
    val_loss: Loss | None = None
    bigram_loss: Loss | None = None
    parameters: Annotated[int, Field(ge=0, le=10**15)] | None = None
    seconds: Amount | None = None
    tokens_per_second: Amount | None = None
    train_loss: tuple[list[Annotated[int, Field(ge=0, le=10**15)]], list[float]] = field(
        default_factory=lambda: ([], [])
    )
    by_block: dict[Tag, dict[StepText, Annotated[dict[BlockText, float], Field(min_length=1)]]] = field(
        default_factory=dict
    )
    decay: Decay | None = None
    unigram_loss: Loss | None = None
    loss_unit: Label = NATS_PER_TOKEN
    figures: Annotated[dict[Tag, Outcome | None], Field(max_length=64)] = field(default_factory=dict)
    main: Label = LOSS
    first_loss: Loss | None = None
    spikes: Annotated[float, Field(ge=0, le=10_000)] | None = None
    grad_norm_p999: float | None = None
    clipped: Annotated[float, Field(ge=0, le=1)] | None = None
    largest_activation: float | None = None
    outcomes: Annotated[dict[Tag, Outcome | None], Field(max_length=256)] = field(default_factory=dict)
    provenance: Annotated[
        dict[Label, Annotated[str, Field(max_length=MAX_WORD)] | int | bool], Field(max_length=32)
    ] = field(default_factory=dict)

    @property
    def start(self) -> float:
        """Loss at the start: the first step's, or the first of the thinned curve in records of before; NaN: neither."""
        if self.first_loss is not None:
            return self.first_loss
        return self.train_loss[1][0] if self.train_loss[1] else math.nan

    def outcome(self, name: str) -> float | None:
        """Return the final validation loss or one of the figures; None: it was no number, or is not known."""
        return self.val_loss if name == LOSS else self.figures.get(name)

    @property
    def failed(self) -> bool:
        """Return whether its loss is no result: a mean over seeds that left it out would hide the failure."""
        return self.status in FAILURES

    def save(self, path: Path) -> None:
        """Write the record as JSON; whole or not at all."""
        text = json.dumps(asdict(self), separators=(",", ":")) + "\n"
        write_whole(path, lambda unfinished: unfinished.write_text(text))

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Read what `save` wrote, as data: nothing that it names is imported, composed or built.

        Raises:
            Untrusted: it is no such record: names the field, its value and what would be valid.
        """
        record: Record = read_json(path, cls, MAX_BYTES)
        if len(record.train_loss[0]) != len(record.train_loss[1]):
            raise Untrusted(f"{path} cannot be read: train_loss has steps and losses of different lengths")
        return record


def collect(planned: Planned, folder: Path, broken: str | None = None) -> Record:
    """Read a run's folder.

    Args:
        planned: the run.
        folder: where it ran.
        broken: what its process said when it failed before the last step; None: it did not.
    """
    identity: dict[str, Any] = {
        "name": planned.name,
        "point": dict(planned.point),
        "seed": planned.seed,
        "overrides": list(planned.overrides),
        "folder": str(folder),
    }
    if not has_curves(folder):
        return Record(**identity, status=BROKEN, reason=broken or "it wrote nothing")
    run = Run(folder)
    steps, losses = run.curve("train/loss")
    _, validation = run.curve("val/loss")
    summary = run.summary
    val_loss = validation[-1] if validation and math.isfinite(validation[-1]) else None
    ended = read_status(folder)
    diverged = ended.get("status") == DIVERGED  # given up, or with a loss that is no number
    stopped = ended.get("reason") if diverged or ended.get("status") in EARLY else None
    stable = run.stability
    baselines = (summary.get("bigram_loss"), summary.get("unigram_loss"))
    if broken is not None:
        status = BROKEN
    elif diverged:
        status = DIVERGED
    else:
        status = judge(losses, val_loss, *baselines, stable.spikes)
        if stopped is not None and status not in FAILURES:
            status = SHORT
    return Record(
        **identity,
        status=status,
        reason=broken or stopped or "",
        val_loss=_rounded(val_loss),
        bigram_loss=_rounded(baselines[0]),
        unigram_loss=_rounded(baselines[1]),
        parameters=summary.get("parameters"),
        seconds=_rounded(summary.get("total_seconds", summary.get("seconds"))),
        tokens_per_second=_rounded(summary.get("tokens_per_second")),
        train_loss=_thinned(steps, losses),
        by_block=_by_block(run),
        **{name: summary[name] for name in ("loss_unit", "main") if name in summary},
        figures={name: storable(_rounded(value)) for name, value in run.figures.items()},
        first_loss=_finite(losses[0]) if losses else None,
        **{name: _rounded(value) for name, value in stable._asdict().items()},
        provenance=summary.get(PROVENANCE, {}),
    )


def judge(
    train_loss: list[float],
    val_loss: float | None,
    bigram_loss: float | None,
    unigram_loss: float | None,
    spikes: float | None = None,
) -> str:
    """Return what a run has come to that reached its last step: one of STATUSES.

    Args:
        train_loss: at each logged step.
        val_loss: at the end; None: no finite number.
        bigram_loss, unigram_loss: validation loss of counted pairs and of counted tokens; None: not known.
        spikes: per 10,000 steps; None: not known.
    """
    if val_loss is None or not train_loss or not math.isfinite(train_loss[-1]):
        return DIVERGED
    # A step that was skipped for a loss that is no number says nothing of those around it.
    train_loss = [loss for loss in train_loss if math.isfinite(loss)]
    size = max(1, round(LATE * len(train_loss)))
    tenths = [statistics.fmean(train_loss[end - size : end]) for end in range(size, len(train_loss) + 1)]
    best = min(tenths)
    nothing_learned = unigram_loss if unigram_loss is not None else train_loss[0]
    # Near 0, as of images that are told apart almost all, the noise alone is more than 10 %.
    if tenths[-1] - best > RISE * max(best, nothing_learned - best):
        return DIVERGED
    if unigram_loss is not None and val_loss >= (
        unigram_loss if bigram_loss is None else (bigram_loss + unigram_loss) / 2
    ):
        return COLLAPSED
    if bigram_loss is not None and val_loss >= bigram_loss:
        return SLOW
    return SPIKING if spikes is not None and spikes > MANY_SPIKES else FINISHED


def loss_units(records: Iterable[Record]) -> str:
    """Return in what the records' losses are, in words."""
    return ", ".join(dict.fromkeys(record.loss_unit for record in records)) or NATS_PER_TOKEN


def storable(value: float | None) -> float | None:
    """Return an outcome as a record holds it."""
    return value if value is not None and abs(value) <= MOST_OUTCOME else None  # no comparison holds of NaN


def _by_block(run: Run) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for tag in BY_BLOCK:
        for block in range(1, MAX_BLOCKS):
            steps, values = run.curve(tag.format(block))
            last = len(steps) - 1
            for i in sorted({round(k * last / (MAX_TIMES - 1)) for k in range(MAX_TIMES)}) if steps else []:
                found.setdefault(tag, {}).setdefault(str(steps[i]), {})[str(block)] = _rounded(values[i])
    return found


def _thinned(steps: list[int], losses: list[float]) -> tuple[list[int], list[float]]:
    every = -(-len(steps) // MAX_POINTS) or 1
    starts = range(0, len(steps) - every + 1, every)
    means = [_rounded(statistics.fmean(losses[i : i + every])) for i in starts]
    return [steps[i + every - 1] for i in starts], means


def _finite(value: float) -> float | None:
    return _rounded(value) if math.isfinite(value) else None


def _rounded(value: Any) -> Any:
    """Return the number to so many digits, which keeps records small."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
