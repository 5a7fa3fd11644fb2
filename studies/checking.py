"""Holds the runs of a study against what there is, before the first of them trains."""

from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig

from core.build import build, import_target
from core.cli import MISTAKES, explain
from core.errors import UserError
from core.options import check_names
from lightning_modules.composing import compose_run
from studies.grid import Planned


def check_runs(runs: Sequence[Planned]) -> None:
    """Compose runs and build their models without weights, one for each label: a slip in hours of runs is said at once.

    What only training finds, as sequences that are longer than the corpus, is left to it.

    Raises:
        UserError: names the label that has not come in any run that is good.
    """
    for run, label in _one_for_each_label(runs):
        try:
            config = compose_run([*run.overrides, f"seed={run.seed}"])
            for field in ("trainer", "data"):
                _check_names(config, field)
            kind: Any = import_target("module._target_", config.module["_target_"])
            if hasattr(kind, "assumed") and hasattr(kind, "weightless"):  # a LightningModule of one's own need not
                build(config, "module", **kind.assumed(config.module)).weightless()
        except MISTAKES as error:
            raise UserError(f"study, {label}: {explain(error, run.overrides)}") from error


def _one_for_each_label(runs: Sequence[Planned]) -> Iterator[tuple[Planned, str]]:
    """Yield runs in which a label comes for the first time, and that label by its axis."""
    seen = set[tuple[str, str]]()
    for run in runs:
        new = [(axis, label) for axis, label in run.point.items() if (axis, label) not in seen]
        if new:
            seen.update(new)
            yield run, ", ".join(f"{axis} {label}" for axis, label in new)


def _check_names(config: DictConfig, field: str) -> None:
    """Refuse a field of a group that its `_target_` does not take; what it is set to is found out when it is built."""
    given = {str(name): value for name, value in config[field].items() if not str(name).startswith("_")}
    check_names(field, import_target(f"{field}._target_", config[field]["_target_"]), given)
