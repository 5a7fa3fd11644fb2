"""Opens runs one after the other and measures them on the same held-out data."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from analysis.anatomy.findings import Findings
from analysis.anatomy.held_out import Batch, HeldOut, has_blocks, held_out
from analysis.anatomy.measure import Comparison, Instrument, Measure, require_fitting
from analysis.anatomy.registry import COMPARISONS, INSTRUMENTS, MEASURES, outcomes
from core.errors import ConfigError, require, suggest
from core.open_run import OpenRun, open_run
from core.task import task_of
from datamodules.samples import positions

FITTING = 4
"""Positions of the training split that measures may fit something on, for each held-out one."""
EXAMPLE = 64
"""Positions of what two models are asked about, before they are held against each other."""
OF_THE_FIRST = "Both read the text with data.document_mask as the first run was trained, the other was not."


@dataclass(frozen=True)
class Chosen:
    """Says what is measured of which runs, and on what.

    Attributes:
        runs: their folders; one may stand there several times, with different checkpoints.
        measures: names in MEASURES and COMPARISONS.
        tokens: at least so many held-out tokens, or of images patches and class tokens.
        data: a prepared corpus; None: the first run's own validation data.
        batch_size: samples side by side; None: as many as the first run was trained on.
        checkpoints: last, best, or a path: one for all, or one for each.
        skip: how blocks are left out.
        allow, device: as core.open_run has them.
    """

    runs: tuple[Path, ...]
    measures: tuple[str, ...]
    tokens: int = 16384
    data: str | None = None
    batch_size: int | None = None
    checkpoints: tuple[str, ...] = ("last",)
    skip: str = "placement"
    allow: Collection[str] = ()
    device: str | None = None


@dataclass(frozen=True)
class Examined:
    """Holds what was found of one run.

    Attributes:
        folder: the run's.
        checkpoint: where its weights come from.
        step: optimizer steps that its weights have seen.
        placement, num_layers, dim, ffn, parameters: of its model.
        document_mask: whether its attention keeps documents apart, as while it was trained.
        findings: by measure; of comparisons, with the first run.
        left_out: why other measures have nothing to say, by measure.
    """

    folder: Path
    checkpoint: Path
    step: int
    placement: str
    num_layers: int
    dim: int
    ffn: str
    parameters: int
    document_mask: bool
    findings: dict[str, Findings] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def by_default(names: Sequence[str], several: bool) -> tuple[str, ...]:
    """Return the names of measures that are asked for: none means all that are not slow.

    Raises:
        ConfigError: there is none of a name, or it compares two runs and there is one.
    """
    known: dict[str, type[Instrument]] = INSTRUMENTS if several else dict(MEASURES)
    for name in names:
        valid = suggest(name, known) if several or name not in COMPARISONS else "one that measures a single run"
        require(name in known, "measures", name, valid)
    return tuple(names) or tuple(name for name, measure in known.items() if not measure.slow)


def examine(chosen: Chosen) -> tuple[HeldOut, list[Examined]]:
    """Measure the runs; one model is in memory at a time, beside the first.

    Args:
        chosen: names of measures, all known.

    Raises:
        ConfigError: a run cannot be opened, it predicts something else than the first one or of other data, or there
            are no data.
    """
    checkpoints = chosen.checkpoints * len(chosen.runs) if len(chosen.checkpoints) == 1 else chosen.checkpoints
    first = _open(chosen.runs[0], checkpoints[0], chosen)
    length, needed = _wants(first, chosen)
    # All are opened before any is measured: a refusal after that loses what was found.
    for folder, checkpoint in zip(chosen.runs[1:], checkpoints[1:], strict=True):
        their_length, theirs = _wants_beside(first, folder, checkpoint, chosen)
        length = None if length is None or their_length is None else min(length, their_length)
        needed |= {name: max(count, needed.get(name, 0)) for name, count in theirs.items()}
    data = _data(first, length, chosen)
    for name, count in needed.items():
        require_fitting(name, count, sum(batch.num_samples for batch in data.fitting), chosen.tokens)
    examined = []
    for number, (folder, checkpoint) in enumerate(zip(chosen.runs, checkpoints, strict=True)):
        run = first if number == 0 else _open(folder, checkpoint, chosen)
        examined.append(_examine(run, first if number else None, data, chosen))
    return data, examined


def _open(folder: Path, checkpoint: str, chosen: Chosen) -> OpenRun:
    run = open_run(folder, checkpoint, chosen.allow, chosen.device)
    valid = "a run of a model of blocks, as lightning_modules.trunk has them"
    require(has_blocks(run.module.model), "RUN", str(folder), valid)
    return run


def _wants(run: OpenRun, chosen: Chosen) -> tuple[int | None, dict[str, int]]:
    """Return the length of a run's sequences, None where samples cannot be cut, and how many samples its measures want
    for fitting, by their names."""
    made = (_of_run(name, run, chosen) for name in chosen.measures if name in MEASURES)
    wanting = (measure for measure in made if measure.lacks(run.module.model) is None)
    return getattr(run.datamodule, "seq_len", None), {measure.name: measure.fitting_samples() for measure in wanting}


def _wants_beside(first: OpenRun, folder: Path, checkpoint: str, chosen: Chosen) -> tuple[int | None, dict[str, int]]:
    """Return the same of another run, which is opened and let go again."""
    other = _open(folder, checkpoint, chosen)
    _require_same(first, other)
    return _wants(other, chosen)


def _require_same(first: OpenRun, other: OpenRun) -> None:
    """Raise ConfigError unless two runs are asked for the same, of data that mean the same to both."""
    ours, theirs = task_of(first.module).predicted, task_of(other.module).predicted
    valid = f"a run of a model that predicts {ours}, as that of {first.folder} does; this one's predicts {theirs}"
    require(ours == theirs, "RUN", str(other.folder), valid)
    read = getattr(other.datamodule, "encoding", {})
    for name, meant in getattr(first.datamodule, "encoding", {}).items():
        valid = f"a run whose {name} are those of {first.folder}, {meant}; this one has {read.get(name)}"
        require(read.get(name) == meant, "RUN", str(other.folder), valid)
    example = first.module.model.example(1, EXAMPLE, torch.Generator().manual_seed(0))
    asked = (run.module.model.asked(example) for run in (first, other))
    same = all(mine.shape == its.shape and bool((mine == its).all()) for mine, its in zip(*asked, strict=True))
    valid = f"a run whose model the same data ask for the same as that of {first.folder}: this one's they ask otherwise"
    require(same, "RUN", str(other.folder), valid)


def _data(first: OpenRun, length: int | None, chosen: Chosen) -> HeldOut:
    from tools.evaluation.corpora import open_corpus

    datamodule = first.datamodule
    if chosen.data is not None:
        valid = "null: a prepared corpus is text, and this run's data are none; it is measured on those of its own"
        require(hasattr(datamodule, "tokenizer"), "data", chosen.data, valid)
        datamodule = open_corpus(first, chosen.data)
    datamodule.prepare_data()
    if chosen.data is None and hasattr(datamodule, "check_trained_on"):  # what is no stream is refused below
        datamodule.check_trained_on(first.data_identity)
    if length is not None:
        datamodule.seq_len = length
    return held_out(datamodule, first.module, chosen.tokens, chosen.batch_size, FITTING * chosen.tokens)


def _of_run(name: str, run: OpenRun, chosen: Chosen) -> Any:
    measure = make(INSTRUMENTS[name], chosen.skip)
    return measure.of_run(run) if isinstance(measure, Measure) else measure


def as_trained(data: HeldOut, document_mask: bool) -> HeldOut:
    """Return the same tokens with positions as a run has them that was trained with or without data.document_mask."""
    if document_mask == is_masked(data):
        return data

    def changed(batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
        made = []
        for batch in batches:
            rows = {name: values for name, values in batch.rows.items() if name != "positions"}
            if document_mask:
                places = positions(rows["tokens"][:, :-1].numpy(), data.tokenizer.end_of_document)
                rows["positions"] = torch.from_numpy(places)
            made.append(replace(batch, rows=rows))
        return tuple(made)

    return replace(data, batches=changed(data.batches), fitting=changed(data.fitting))


def is_masked(data: HeldOut) -> bool:
    """Return whether attention keeps documents apart on this text."""
    return "positions" in data.batches[0].rows


def _examine(run: OpenRun, first: OpenRun | None, data: HeldOut, chosen: Chosen) -> Examined:
    model, config = run.module.model, run.module.model_config
    found: dict[str, Findings] = {}
    left_out: dict[str, str] = {}
    mask = getattr(run.datamodule, "document_mask", False) if first else is_masked(data)
    own = as_trained(data, mask).seen_by(model)
    for name in chosen.measures:
        measure = _of_run(name, run, chosen)
        models = (model,) if isinstance(measure, Measure) else (first and first.module.model, model)
        if None in models:
            continue
        reason = measure.lacks(*models)
        if reason is not None:
            left_out[name] = reason
            continue
        with _bar(f"{run.folder.name}: {name}", own if isinstance(measure, Measure) else data) as watched:
            found[name] = measure(*models, watched)
        if isinstance(measure, Comparison) and mask != is_masked(data):
            found[name] = replace(found[name], notes=(*found[name].notes, OF_THE_FIRST))
    size = sum(parameter.numel() for parameter in model.parameters())
    shape = (config.placement, config.num_layers, config.dim, config.ffn, size, mask)
    return Examined(run.folder, run.checkpoint, run.step, *shape, found, left_out)


def make(measure: type[Instrument], skip: str) -> Instrument:
    """Return a measure with its defaults, and blocks left out in this way where it leaves some out."""
    made = measure()
    return replace(made, skip=skip) if "skip" in {option.name for option in fields(made)} else made  # type: ignore


@contextmanager
def _bar(description: str, data: HeldOut) -> Iterator[HeldOut]:
    """Draw a bar on a terminal while the data are gone through, however often that is."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[passed]} batches"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None, passed=0)
        passed = [0]

        def step() -> None:
            passed[0] += 1
            progress.update(task, passed=passed[0])

        yield data.watched(step)


def outcomes_of(folder: Path, names: Iterable[str], **options: Any) -> dict[str, float | None]:
    """Return scalars of a run by their names; None where its model has nothing of the kind.

    Args:
        folder: the run's.
        names: outcomes of measures.
        options: fields of Chosen.

    Raises:
        ConfigError: the run cannot be opened.
    """
    measures = dict.fromkeys(known_outcomes(names).values())
    _, (found,) = examine(Chosen((folder,), tuple(measures), **options))
    scalars = {name: value for part in found.findings.values() for name, value in part.scalars.items()}
    return {name: scalars.get(name) for name in names}


def known_outcomes(names: Iterable[str]) -> dict[str, str]:
    """Return the measure of each outcome.

    Raises:
        ConfigError: there is none of a name.
    """
    known = {outcome: measure.name for outcome, measure in outcomes().items()}
    for name in names:
        if name not in known:
            raise ConfigError("outcomes", name, suggest(name, known))
    return {name: known[name] for name in names}
