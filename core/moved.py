"""Modules that have moved: whatever names an old one is understood, be it a saved configuration or a command line."""

import re
from typing import Any

_NOW_IN = {
    "callbacks.monitors": (
        *("block_monitor", "curvature", "gradient_health", "noise_scale", "representation_collapse"),
        *("signal_propagation", "throughput"),
    ),
    "callbacks.divergence": (
        *("detectors", "divergence", "divergence_report", "event_log", "flight_recorder", "loss_scaling", "one_step"),
        *("samples", "worst_group", "policies.adagc", "policies.base", "policies.cooldown", "policies.registry"),
        *("policies.rollback", "policies.skip", "policies.snapshot", "policies.snapshot_file", "policies.stop"),
        *("policies.warn", "policies.zclip"),
    ),
    "callbacks.checkpointing": ("best_checkpoint", "last_checkpoint", "random_state"),
    "callbacks.console": ("dashboard", "hyperparameters", "progress", "run_status", "run_summary", "text_sample"),
}
MOVED = {f"callbacks.{module}": f"{package}.{module}" for package, modules in _NOW_IN.items() for module in modules}
"""The old name of each module, and the one of today."""


def current_name(name: str) -> str:
    """Return the name under which a class is found today.

    Args:
        name: of a class, as a `_target_` has it: package.module.Class. What has not moved is returned as it is.
    """
    module, _, attribute = name.rpartition(".")
    return f"{MOVED[module]}.{attribute}" if module in MOVED else name


def with_current_names(node: Any) -> Any:
    """Return plain values (mappings, lists, scalars) in which every `_target_` is a name of today."""
    if isinstance(node, list):
        return [with_current_names(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: current_name(value) if key == "_target_" and isinstance(value, str) else with_current_names(value)
        for key, value in node.items()
    }


def override_with_current_names(override: str) -> str:
    """Return an override of a command line in which every `_target_` is a name of today."""
    target = r"(_target_['\"]?\s*[=:]\s*['\"]?)([A-Za-z_][\w.]*)"
    return re.sub(target, lambda found: found[1] + current_name(found[2]), override)


def describe_move(error: BaseException | None) -> str:
    """Return what belongs behind the message of a failed import: where the module is now; empty if it has not moved."""
    name = error.name if isinstance(error, ImportError) else None
    return f"; {name} is now {MOVED[name]}" if name in MOVED else ""
