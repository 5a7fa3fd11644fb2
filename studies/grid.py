"""A study: a question, and the grid of runs that is to answer it. Read from configs/study/NAME.yaml."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
        scale: laptop, gpu or paper, or what else the file has.
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

    def runs(self) -> list[Planned]:
        """Return the runs of the whole grid: with select_seeds where there are some, and else with `seeds`."""
        return self._plan(itertools.product(*self.axes.values()), self.select_seeds or self.seeds)

    def runs_at(self, points: Iterable[Point]) -> list[Planned]:
        """Return the runs of selected points, with `seeds`."""
        return self._plan(points, self.seeds)

    def _plan(self, points: Iterable[Point], seeds: Sequence[int]) -> list[Planned]:
        """Return the runs seed by seed: a study that is broken off has few seeds of everything, not all of a part."""
        runs = []
        for seed, labels in itertools.product(seeds, points):
            point = dict(zip(self.axes, labels, strict=True))
            chosen = [override for axis, label in point.items() for override in self.axes[axis][label]]
            name = re.sub(r"[^\w.-]+", "-", "_".join([*labels, f"seed{seed}"]))  # fit for a folder, and for a sweep
            runs.append(Planned(name, point, seed, (*self.overrides, *chosen)))
        return runs

    def save(self, path: Path) -> None:
        """Write it as YAML that `load` reads, whole or not at all."""
        lists = {name: list(getattr(self, name)) for name in ("seeds", "overrides", "select_seeds", "family")}
        content = OmegaConf.create({**vars(self), **lists})
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
        return study


def read(name: str, config: DictConfig, scale: str, seeds: Sequence[int] | None = None) -> Study:
    """Return a study from its config.

    Args:
        name: of the study.
        config: the content of its file.
        scale: one of those under its `scales`; what stands there replaces what stands above.
        seeds: others than the file's; None: those.

    Raises:
        ConfigError: an unknown scale, or an axis or seeds that are no such thing.
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
    known = {"question", "needs", "axes", "baseline", "seeds", "select_seeds", "family", "overrides"}
    for field in chosen:
        if field not in known:
            raise ConfigError("study", field, suggest(field, known))
    require(
        isinstance(chosen.get("axes"), dict) and chosen["axes"], "study.axes", chosen.get("axes"), "a group of axes"
    )
    for field in ("question", "needs"):
        require(isinstance(chosen.get(field), str), f"study.{field}", chosen.get(field), "text")
    axes = {axis: _axis(axis, points) for axis, points in chosen["axes"].items()}
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
    family = chosen.get("family") or []
    valid = "labels on the first axis other than the baseline"
    require(isinstance(family, list), "study.family", family, f"a list of {valid}")
    for label in family:
        require(label in first and label != baseline, "study.family", label, valid)
    overrides = (*content.get("overrides", []), *scales[scale].get("overrides", []))
    return Study(
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
    )


def _check_seeds(field: str, seeds: Any) -> None:
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    require(whole and seeds, field, seeds, "a list of integers >= 0, as [0,1,2]")


def _axis(name: str, points: Any) -> Axis:
    """Return a list of values of the field that the axis is called after, or a mapping of labels to overrides."""
    valid = "a list of values of the field that it is named after, or labels with their overrides"
    require(isinstance(points, list | dict) and len(points) > 0, f"study.axes.{name}", points, valid)
    if isinstance(points, list):
        return {_word(value): [f"{name}={_word(value)}"] for value in points}
    return {str(label): [given] if isinstance(given, str) else list(given) for label, given in points.items()}


def _word(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
