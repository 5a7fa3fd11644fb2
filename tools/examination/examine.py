"""Opens runs one after the other and measures them on one text."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from analysis.anatomy.findings import Findings
from analysis.anatomy.measure import Instrument, Measure, require_fitting
from analysis.anatomy.registry import COMPARISONS, INSTRUMENTS, MEASURES, outcomes
from analysis.anatomy.text import Text, held_out
from core.errors import ConfigError, require, suggest
from core.open_run import OpenRun, open_run

FITTING = 4
"""Tokens of the training split that measures may fit something on, for each held-out one."""


@dataclass(frozen=True)
class Chosen:
    """Says what is measured of which runs, and on what.

    Attributes:
        runs: their folders.
        measures: names in MEASURES and COMPARISONS.
        tokens: of the text, at least.
        data: a prepared corpus; None: the first run's own validation data.
        batch_size: sequences side by side; None: as many as the first run was trained on.
        checkpoint: last, best, or a path.
        skip: how blocks are left out.
        allow: as core.open_run has it.
    """

    runs: tuple[Path, ...]
    measures: tuple[str, ...]
    tokens: int = 16384
    data: str | None = None
    batch_size: int | None = None
    checkpoint: str = "last"
    skip: str = "placement"
    allow: Collection[str] = ()


@dataclass(frozen=True)
class Examined:
    """Holds what was found of one run.

    Attributes:
        folder: the run's.
        step: optimizer steps that its weights have seen.
        placement, num_layers, dim, ffn, parameters: of its model.
        findings: by measure; of comparisons, with the first run.
        left_out: why other measures have nothing to say, by measure.
    """

    folder: Path
    step: int
    placement: str
    num_layers: int
    dim: int
    ffn: str
    parameters: int
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


def examine(chosen: Chosen) -> tuple[Text, list[Examined]]:
    """Measure the runs; one model is in memory at a time, beside the first.

    Args:
        chosen: names of measures, all known.

    Raises:
        ConfigError: a run cannot be opened, its tokens are not the first one's, or there is no text.
    """
    first = open_run(chosen.runs[0], chosen.checkpoint, chosen.allow)
    length, needed = _wants(first, chosen)
    for folder in chosen.runs[1:]:  # all are opened before any is measured: a refusal after that loses what was found
        their_length, theirs = _wants_beside(first, folder, chosen)
        length = min(length, their_length)
        needed |= {name: max(count, needed.get(name, 0)) for name, count in theirs.items()}
    text = _text(first, length, chosen)
    for name, count in needed.items():
        require_fitting(name, count, sum(len(batch.inputs) for batch in text.fitting), chosen.tokens)
    examined = []
    for number, folder in enumerate(chosen.runs):
        run = first if number == 0 else open_run(folder, chosen.checkpoint, chosen.allow)
        examined.append(_examine(run, first if number else None, text, chosen))
    return text, examined


def _wants(run: OpenRun, chosen: Chosen) -> tuple[int, dict[str, int]]:
    """Return the length of a run's sequences, and how many of them its measures want for fitting, by their names."""
    made = (_of_run(name, run, chosen) for name in chosen.measures if name in MEASURES)
    wanting = (measure for measure in made if measure.lacks(run.module.model) is None)
    return run.datamodule.seq_len, {measure.name: measure.fitting_sequences() for measure in wanting}


def _wants_beside(first: OpenRun, folder: Path, chosen: Chosen) -> tuple[int, dict[str, int]]:
    """Return the same of another run, which is opened and let go again."""
    other = open_run(folder, chosen.checkpoint, chosen.allow)
    ours, theirs = first.datamodule.tokenizer, other.datamodule.tokenizer
    same = getattr(ours, "content", ours.name) == getattr(theirs, "content", theirs.name)
    same = same and first.datamodule.vocab_size == other.datamodule.vocab_size
    valid = f"a run whose tokens are those of {first.folder}, {ours.name}; this one has {theirs.name}"
    require(same, "RUN", str(folder), valid)
    return _wants(other, chosen)


def _text(first: OpenRun, length: int, chosen: Chosen) -> Text:
    from tools.evaluation.corpora import open_corpus

    datamodule = first.datamodule if chosen.data is None else open_corpus(first, chosen.data)
    datamodule.prepare_data()
    datamodule.seq_len = length
    return held_out(datamodule, chosen.tokens, chosen.batch_size, FITTING * chosen.tokens)


def _of_run(name: str, run: OpenRun, chosen: Chosen) -> Any:
    measure = make(INSTRUMENTS[name], chosen.skip)
    return measure.of_run(run) if isinstance(measure, Measure) else measure


def _examine(run: OpenRun, first: OpenRun | None, text: Text, chosen: Chosen) -> Examined:
    model, config = run.module.model, run.module.model_config
    found: dict[str, Findings] = {}
    left_out: dict[str, str] = {}
    for name in chosen.measures:
        measure = _of_run(name, run, chosen)
        models = (model,) if isinstance(measure, Measure) else (first and first.module.model, model)
        if None in models:
            continue
        reason = measure.lacks(*models)
        if reason is not None:
            left_out[name] = reason
            continue
        with _bar(f"{run.folder.name}: {name}", text) as watched:
            found[name] = measure(*models, watched)
    size = sum(parameter.numel() for parameter in model.parameters())
    shape = (config.placement, config.num_layers, config.dim, config.ffn, size)
    return Examined(run.folder, run.step, *shape, found, left_out)


def make(measure: type[Instrument], skip: str) -> Instrument:
    """Return a measure with its defaults, and blocks left out in this way where it leaves some out."""
    made = measure()
    return replace(made, skip=skip) if "skip" in {option.name for option in fields(made)} else made  # type: ignore


@contextmanager
def _bar(description: str, text: Text) -> Iterator[Text]:
    """Draw a bar on a terminal while the text is gone through, however often that is."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[passed]} batches"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None, passed=0)
        passed = [0]

        def step() -> None:
            passed[0] += 1
            progress.update(task, passed=passed[0])

        yield text.watched(step)


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
