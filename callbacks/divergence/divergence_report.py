"""Writes what a run that was stopped leaves behind for a person to read."""

import math
import shlex
from pathlib import Path

from callbacks.divergence.policies.base import Step
from callbacks.divergence.worst_group import GroupHistory, describe
from core.printable import printable


def write_report(run_dir: str, step: Step, line: str, groups: GroupHistory) -> Path:
    """Write RUN/divergence.md: the event, the last losses, every group's gradient, and what can be done now."""
    losses = [f"{loss:.4g}" for loss in step.detectors_before["loss"]["values"][-16:]]
    norms = [f"{math.exp(log):.3g}" for log in step.detectors_before["gradient"]["values"][-16:]]
    text = [
        f"# Stopped before the update of step {step.number}",
        "",
        printable(line, limit=None),
        "",
        f"Losses of the finite steps before, the newest last: {', '.join(losses)}, then {step.loss:.4g}.",
        f"Their gradient norms: {', '.join(norms)}, then {step.statistics.total_norm:.3g}.",
        "",
        "| group | gradient norm | usual | not finite |",
        "|---|---|---|---|",
    ]
    statistics = step.statistics
    usual = [f"{math.exp(log):.3g}" for log in groups.usual] or ["-"] * len(statistics.groups)
    for group, norm, before, share in zip(
        statistics.groups, statistics.norms, usual, statistics.nonfinite, strict=True
    ):
        text.append(f"| {describe(group)} | {norm:.3g} | {before} | {100 * share:.3g} % |")
    text += [
        "",
        f"Look at the step again: `python -m tools.replay {printable(shlex.quote(run_dir))} step={step.number}`.",
        "",
        "The last checkpoint is from before this step. Resumed as it is, the run comes to the same place; go on with",
        "another policy (`callbacks.divergence.policy=rollback`) or a lower `optim.lr`.",
    ]
    path = Path(run_dir, "divergence.md")
    path.write_text("\n".join(text) + "\n")
    return path
