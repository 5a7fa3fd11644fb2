"""A study: a question, and the grid of runs that is to answer it. Read from configs/study/NAME.yaml."""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, Field

from core.atomic_write import write_whole
from core.errors import ConfigError, require, suggest
from core.untrusted import Untrusted, beyond, bound, parse_json, read_yaml

# What the file of a study may hold, which may come from anywhere.
Label = Annotated[str, Field(max_length=200)]
Override = Annotated[str, Field(max_length=4000)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Axis = Annotated[dict[Label, Annotated[list[Override], Field(max_length=100)]], Field(min_length=1, max_length=1000)]
"""What each of the axis' points is called, and the overrides of train.py that it stands for."""
MAX_RUNS = 10_000
"""Of a study whose file is read; points times seeds."""
LEARNING_RATE = "optim.lr"
"""The axis whose best value is selected, where a study has it."""
RATE = "rate"
"""The axis of multiples of the rate that another study has selected, where a study has `rates_from`."""
Point = tuple[str, ...]
"""Labels on a study's axes, in their order."""


@dataclass(frozen=True)
class Planned:
    """One run of a study.

    Attributes:
        name: of its folder: the points and the seed, joined.
        point: {axis: label}.
        seed: of the run.
        overrides: of train.py, without seed and folder.
    """

    name: str
    point: Mapping[str, str]
    seed: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A grid over one scale's overrides.

    Attributes:
        name: that of its file.
        scale: laptop, day, gpu or paper, or what else the file has.
        question: what it is to answer, in a sentence.
        needs: hardware and time, in words.
        axes: by name; their product is the grid. The first is what the others are seen against.
        baseline: label on the first axis that the others are compared with.
        seeds: every point is run with each; with select_seeds, only the selected ones.
        overrides: of train.py, for every run.
        select_seeds: those with which the learning rate is selected, apart from the seeds that judge it: the grid is
            run with these, and only each best rate with `seeds`. Empty: `seeds` do both.
        family: labels on the first axis whose comparisons with the baseline are the study's claims, named before it
            is run: p is corrected for their number. Empty: all of them.
        least_difference: between two outcomes that counts as one; what is smaller is not told apart however sure it is.
        select_overrides: of train.py, for the runs that select alone: shorter ones, as trainer.max_steps=500.
        judge: labels on the first axis that are run with `seeds` once their rates are selected. Empty: all of them.
        rates: {labels on the axes but RATE, joined: learning rate}, where another study has selected it. Empty: the
            overrides say what the rate is.
        rate_factors: {label on the axis RATE: what it multiplies that rate by}.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Label
    scale: Label
    question: Annotated[str, Field(max_length=4000)]
    needs: Annotated[str, Field(max_length=1000)]
    axes: Annotated[dict[Label, Axis], Field(min_length=1, max_length=8)]
    baseline: Label | None
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000)]
    overrides: Annotated[tuple[Override, ...], Field(max_length=1000)]
    select_seeds: Annotated[tuple[Seed, ...], Field(max_length=1000)] = ()
    family: Annotated[tuple[Label, ...], Field(max_length=1000)] = ()
    least_difference: Annotated[float, Field(ge=0, lt=1e6)] = 0.0
    select_overrides: Annotated[tuple[Override, ...], Field(max_length=1000)] = ()
    judge: Annotated[tuple[Label, ...], Field(max_length=1000)] = ()
    rates: Annotated[dict[Label, Annotated[float, Field(gt=0, lt=1e6)]], Field(max_length=MAX_RUNS)] = field(
        default_factory=dict
    )
    rate_factors: Annotated[dict[Label, Annotated[float, Field(gt=0, lt=1e6)]], Field(max_length=1000)] = field(
        default_factory=dict
    )

    def runs(self) -> list[Planned]:
        """Return the runs of the whole grid: with select_seeds where there are some, and else with `seeds`."""
        points = itertools.product(*self.axes.values())
        if self.select_seeds:
            return self._plan(points, self.select_seeds, self.select_overrides)
        return self._plan(points, self.seeds)

    def runs_at(self, points: Iterable[Point]) -> list[Planned]:
        """Return the runs of selected points, with `seeds`; only those that are to be judged."""
        return self._plan(filter(self.is_judged, points), self.seeds)

    def is_judged(self, point: Point) -> bool:
        """Return whether a point is one of those that are run with `seeds` once its rate is selected."""
        return not self.judge or point[0] in self.judge

    def _plan(self, points: Iterable[Point], seeds: Sequence[int], more: Sequence[str] = ()) -> list[Planned]:
        """Return the runs seed by seed: a study that is broken off has few seeds of everything, not all of a part."""
        runs = []
        for seed, labels in itertools.product(seeds, points):
            point = dict(zip(self.axes, labels, strict=True))
            chosen = [override for axis, label in point.items() for override in self.axes[axis][label]]
            if self.rates:
                rate = self.rates[scheme_of(point)] * self.rate_factors[point[RATE]]
                chosen.append(f"{LEARNING_RATE}={rate:g}")
            chosen += more
            name = re.sub(r"[^\w.-]+", "-", "_".join([*labels, f"seed{seed}"]))  # fit for a folder, and for a sweep
            runs.append(Planned(name, point, seed, (*self.overrides, *chosen)))
        return runs

    def save(self, path: Path) -> None:
        """Write it as YAML that `load` reads, whole or not at all."""
        content = OmegaConf.create(
            {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        )
        write_whole(path, lambda unfinished: OmegaConf.save(content, unfinished))

    @classmethod
    def load(cls, path: Path) -> "Study":
        """Read what `save` wrote, as data.

        Raises:
            Untrusted: it is no such file, or of more runs than MAX_RUNS.
        """
        try:
            text = json.dumps(read_yaml(path))
        except (TypeError, ValueError) as error:  # a date, bytes, a number of thousands of digits
            raise Untrusted(f"{path} cannot be read: {error}") from error
        study: Study = parse_json(text, path, cls)
        seeds = max(len(study.seeds), len(study.select_seeds))
        runs = seeds * math.prod(len(axis) for axis in study.axes.values())
        if runs > bound(MAX_RUNS):
            raise Untrusted(beyond(f"{path} plans {runs:,} runs", MAX_RUNS))
        if study.baseline is not None and study.baseline not in next(iter(study.axes.values())):
            raise Untrusted(f"{path} cannot be read: baseline={study.baseline!r} is no label of its first axis")
        if study.rates and not (
            set(study.schemes()) <= set(study.rates) and study.factors == study.rate_factors.keys()
        ):
            raise Untrusted(f"{path} cannot be read: rates and rate_factors are not those of its axes")
        return study

    def schemes(self) -> Iterable[str]:
        """Yield, for each point of the axes but RATE, the labels joined: the keys of `rates`."""
        axes = {axis: labels for axis, labels in self.axes.items() if axis != RATE}
        for labels in itertools.product(*axes.values()):
            yield scheme_of(dict(zip(axes, labels, strict=True)))

    @property
    def factors(self) -> set[Label]:
        """The labels on the axis RATE; none where there is no such axis."""
        return set(self.axes.get(RATE, ()))


def scheme_of(point: Mapping[str, str]) -> str:
    """Return a point's labels, that on RATE aside, joined."""
    return ", ".join(label for axis, label in point.items() if axis != RATE)


OF_EACH_RUN = ("seed", "run_dir", "ckpt_path", "blocks")
"""Fields that studies.run sets."""
RatesOf = Callable[[str], Sequence[tuple[Mapping[str, str], float]]]
"""Takes the name of a study, and returns the learning rates that it has selected: ({axis: label}, rate)."""
FIELDS = (
    "question",
    "needs",
    "axes",
    "baseline",
    "seeds",
    "overrides",
    "family",
    "least_difference",
    "select_seeds",
    "select_overrides",
    "judge",
    "rates_from",
    "rate_factors",
)


def no_rates(name: str) -> Sequence[tuple[Mapping[str, str], float]]:
    """Return that no other study has selected any rate."""
    return ()


def read(
    name: str, config: DictConfig, scale: str, seeds: Sequence[int] | None = None, rates_of: RatesOf = no_rates
) -> Study:
    """Return a study from its config.

    Args:
        name: of the study.
        config: the content of its file.
        scale: one of those under its `scales`; what stands there replaces what stands above.
        seeds: others than the file's; None: those.
        rates_of: what looks up the rates that another study has selected, where this one has `rates_from`.

    Raises:
        ConfigError: an unknown scale, an axis or seeds that are no such thing, or a rate that is not selected yet.
    """
    content: Any = OmegaConf.to_container(config)
    scales = content.pop("scales", None)
    require(
        isinstance(scales, dict) and len(scales) > 0, "study.scales", scales, "a group with a scale in it, as laptop"
    )
    if not isinstance(scale, str) or scale not in scales:
        raise ConfigError("scale", scale, suggest(str(scale), scales))
    require(isinstance(scales[scale], dict), f"study.scales.{scale}", scales[scale], "a group of fields")
    given = {} if seeds is None else {"seeds": [*seeds] if isinstance(seeds, Sequence) else seeds}
    chosen = {**content, **scales[scale], **given}
    for key in chosen:
        if key not in FIELDS:
            raise ConfigError("study", key, suggest(key, FIELDS))
    require(
        isinstance(chosen.get("axes"), dict) and chosen["axes"], "study.axes", chosen.get("axes"), "a group of axes"
    )
    for key in ("question", "needs"):
        require(isinstance(chosen.get(key), str), f"study.{key}", chosen.get(key), "text")
    axes = {axis: _axis(axis, points) for axis, points in chosen["axes"].items()}
    factors = _rate_factors(chosen, axes)
    _check_seeds("seeds", chosen["seeds"])
    select_seeds = chosen.get("select_seeds") or []
    if select_seeds:
        _check_seeds("study.select_seeds", select_seeds)
        valid = f"seeds other than those that judge, {chosen['seeds']}"
        require(not set(select_seeds) & set(chosen["seeds"]), "study.select_seeds", select_seeds, valid)
        valid = f"none in a study without an axis {LEARNING_RATE}: its best value is what they select"
        require(LEARNING_RATE in axes, "study.select_seeds", select_seeds, valid)
    baseline = chosen.get("baseline")
    first = next(iter(axes.values()))
    if baseline is not None and baseline not in first:
        raise ConfigError("study.baseline", baseline, suggest(baseline, first))
    judge = _labels("judge", chosen, first, "labels on the first axis")
    if baseline is not None and judge:
        require(baseline in judge, "study.judge", judge, f"labels among which is the baseline's, {baseline!r}")
    judged = [label for label in judge or first if label != baseline]
    family = _labels("family", chosen, judged, "labels on the first axis that are judged, other than the baseline")
    least = chosen.get("least_difference", 0.0)
    fits = type(least) in (int, float) and 0 <= least < math.inf
    require(fits, "study.least_difference", least, "a number >= 0")
    select_overrides = _overrides("select_overrides", chosen)
    for key, given_there in (("select_overrides", select_overrides), ("judge", judge)):
        valid = "none without study.select_seeds, which they belong to"
        require(not given_there or bool(select_seeds), f"study.{key}", given_there, valid)
    overrides = [text for part in (content, scales[scale]) for text in _overrides("overrides", part)]
    study = Study(
        name=name,
        scale=scale,
        question=chosen["question"],
        needs=chosen["needs"],
        axes=axes,
        baseline=baseline,
        seeds=tuple(chosen["seeds"]),
        overrides=tuple(dict.fromkeys(overrides)),
        select_seeds=tuple(select_seeds),
        family=tuple(family),
        least_difference=float(least),
        select_overrides=tuple(select_overrides),
        judge=tuple(judge),
        rates=_rates(axes, factors, chosen["rates_from"], rates_of) if factors else {},
        rate_factors=factors,
    )
    _check_runs(study)
    return study


def _overrides(key: str, part: Mapping[str, Any]) -> list[str]:
    return _texts(f"study.{key}", part.get(key) or [])


def _check_runs(study: Study) -> None:
    """Refuse what would make two runs one: a name for both, or a seed or folder of which each run has its own."""
    names = dict[str, Planned]()
    for run in study.runs():
        other = names.setdefault(run.name, run)
        if other is not run:
            both = f"{', '.join(other.point.values())} and {', '.join(run.point.values())}"
            raise ConfigError("study.axes", both, f"labels that differ in a file's name: both would be {run.name}")
    of_axes = [(f"axes.{axis}", given) for axis, labels in study.axes.items() for given in labels.values()]
    for key, given in [("overrides", study.overrides), ("select_overrides", study.select_overrides), *of_axes]:
        for override in given:
            name = override.partition("=")[0].lstrip("+~")
            require(name not in OF_EACH_RUN, f"study.{key}", override, "none that each run of a study has its own of")


def _labels(key: str, chosen: Mapping[str, Any], known: Iterable[str], valid: str) -> list[str]:
    labels = _texts(f"study.{key}", chosen.get(key) or [])
    for label in labels:
        require(label in known, f"study.{key}", label, valid)
    return labels


def _texts(name: str, values: Any) -> list[str]:
    whole = isinstance(values, list) and all(isinstance(value, str) for value in values)
    require(whole, name, values, "a list of texts")
    return list(values)


def _rate_factors(chosen: Mapping[str, Any], axes: dict[str, Axis]) -> dict[str, float]:
    """Return study.rate_factors by label, and put their axis behind the others."""
    source, factors = chosen.get("rates_from"), chosen.get("rate_factors")
    if source is None and factors is None:
        return {}
    require(isinstance(source, str), "study.rates_from", source, "the name of the study that has selected the rates")
    numbers = isinstance(factors, list) and all(type(factor) in (int, float) and factor > 0 for factor in factors)
    require(bool(numbers and factors), "study.rate_factors", factors, "a list of numbers > 0, as [2,4]")
    for axis in (LEARNING_RATE, RATE):
        valid = "none beside study.rates_from, from which the learning rates come"
        require(axis not in axes, f"study.axes.{axis}", axes.get(axis), valid)
    assert isinstance(factors, list)
    found = {f"{factor:g} x best": float(factor) for factor in factors}
    axes[RATE] = {label: [] for label in found}
    return found


def _rates(axes: Mapping[str, Axis], factors: Mapping[str, float], source: str, rates_of: RatesOf) -> dict[str, float]:
    """Return the rate of each point of the axes but RATE, as the source has selected it."""
    others = {axis: labels for axis, labels in axes.items() if axis != RATE}
    selected = rates_of(source)
    found = {}
    for labels in itertools.product(*others.values()):
        point = dict(zip(others, labels, strict=True))
        rate = next((rate for theirs, rate in selected if theirs.items() <= point.items()), None)
        valid = f"a study that has selected a rate for {scheme_of(point)!r}, by the same axes and labels"
        if rate is None:
            raise ConfigError("study.rates_from", source, valid)
        found[scheme_of(point)] = rate
    return found


def _check_seeds(field: str, seeds: Any) -> None:
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    require(bool(whole and seeds), field, seeds, "a list of integers >= 0, as [0,1,2]")
    require(len(set(seeds)) == len(seeds), field, seeds, "each once: the same run is no second one")


def _axis(name: str, points: Any) -> Axis:
    """Return a list of values of the field that the axis is called after, or a mapping of labels to overrides."""
    valid = "a list of values of the field that it is named after, or labels with their overrides"
    require(isinstance(points, list | dict) and len(points) > 0, f"study.axes.{name}", points, valid)
    if isinstance(points, list):
        words = list(map(_word, points))
        require(len(set(words)) == len(words), f"study.axes.{name}", points, "each value once")
        return {word: [f"{name}={word}"] for word in words}
    return {str(label): [given] if isinstance(given, str) else list(given) for label, given in points.items()}


def _word(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
