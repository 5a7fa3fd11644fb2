"""Modules that have moved and fields that have been renamed: an old name is understood wherever it comes from.

A saved configuration or checkpoint is opened without a word; a command line is answered with a line of the new name.
"""

import re
from collections.abc import Mapping
from typing import Any

_NOW_IN = {
    "callbacks.monitors": (
        "block_monitor",
        "curvature",
        "gradient_health",
        "noise_scale",
        "representation_collapse",
        "signal_propagation",
        "throughput",
    ),
    "callbacks.divergence": (
        "detectors",
        "divergence",
        "divergence_report",
        "event_log",
        "flight_recorder",
        "loss_scaling",
        "policies.adagc",
        "policies.base",
        "policies.cooldown",
        "policies.registry",
        "policies.rollback",
        "policies.skip",
        "policies.snapshot",
        "policies.snapshot_file",
        "policies.stop",
        "policies.warn",
        "policies.zclip",
        "samples",
        "worst_group",
    ),
    "callbacks.checkpointing": ("best_checkpoint", "last_checkpoint", "random_state"),
    "callbacks.console": ("dashboard", "hyperparameters", "progress", "run_status", "run_summary", "text_sample"),
}
MOVED = {
    **{f"callbacks.{module}": f"{package}.{module}" for package, modules in _NOW_IN.items() for module in modules},
    "callbacks.one_step": "callbacks.divergence.step_override",
    "callbacks.divergence.one_step": "callbacks.divergence.step_override",
    "core.ending": "core.early_end",
    "core.fields": "core.dataclass_cli",
    "core.pieces": "core.sharded_checkpoint",
    "core.pieces_of_processes": "core.distributed_checkpoint",
    "core.quiet": "core.console",
    "core.together": "core.rank_errors",
    "core.whole_file": "core.atomic_write",
    "tools.exporting.own_code": "tools.exporting.remote_code",
    "tools.signal": "tools.propagation",
}
"""The old name of each module, and the one of today."""

RENAMED_FIELDS = {
    "model": {"checkpoint_every": "activation_checkpoint_every"},
    "model.moe": {"every": "layer_interval"},
    "optim": {"_target_": "optimizer"},  # as elsewhere under Hydra
}
"""For each group of fields, the old name of a field and the one of today."""


def current_name(name: str) -> str:
    """Return the name under which a class is found today.

    Args:
        name: of a class, as a `_target_` has it: package.module.Class. What has not moved is returned as it is.
    """
    module, _, attribute = name.rpartition(".")
    return f"{MOVED[module]}.{attribute}" if module in MOVED else name


def with_current_names(node: Any, group: str = "") -> Any:
    """Return plain values (mappings, lists, scalars) in which every `_target_` and field has its name of today.

    Args:
        node: a configuration, or a part of one.
        group: the group of RENAMED_FIELDS that a mapping is; none: it may hold such groups at any depth.
    """
    if isinstance(node, list):
        return [with_current_names(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    found = {}
    for key, value in with_current_fields(node, group).items():
        inner = f"{group}.{key}" if group else key
        if key == "_target_" and isinstance(value, str):
            found[key] = current_name(value)
        else:
            found[key] = with_current_names(value, inner if inner in RENAMED_FIELDS else "")
    return found


def with_current_fields(values: Mapping[Any, Any], group: str) -> dict[Any, Any]:
    """Return the values of one group of RENAMED_FIELDS, each by its field's name of today.

    A value under the old name stays where there is one under the new name too: whoever checks the fields refuses it.
    """
    names = RENAMED_FIELDS.get(group, {})
    return {key if names.get(key, key) in values else names.get(key, key): value for key, value in values.items()}


def override_with_current_names(override: str) -> str:
    """Return an override of a command line in which every `_target_` and field has its name of today."""
    target = r"(_target_['\"]?\s*[=:]\s*['\"]?)([A-Za-z_][\w.]*)"
    return re.sub(target, lambda found: found[1] + current_name(found[2]), rename_fields(override)[0])


def rename_fields(override: str) -> tuple[str, list[str]]:
    """Return an override with the names of today for its fields, and for each that had an old one a line that says so.

    Args:
        override: in Hydra's grammar; what is none is returned as it is. The fields of a mapping are renamed as well:
            model={checkpoint_every: 2}.
    """
    key, equals, value = override.partition("=")
    parts = re.fullmatch(r"([+~]*(?:module\.)?)([\w.]+)", key)
    if parts is None:
        return override, []
    prefix, field = parts.groups()
    notes = []
    for group, names in RENAMED_FIELDS.items():
        for old, new in names.items():
            if field == f"{group}.{old}":
                field = f"{group}.{new}"
                notes.append(f"{group}.{old} is now {group}.{new}")
            elif value.startswith("{") and f"{group}.".startswith(f"{field}."):
                value, count = re.subn(rf"(?<=[{{,\s'\"]){old}(?=['\"]?\s*:)", new, value)
                notes += [f"{group}.{old} is now {group}.{new}"] * bool(count)
    return f"{prefix}{field}{equals}{value}", notes


def describe_move(error: BaseException | None) -> str:
    """Return what belongs behind the message of a failed import: where the module is now; empty if it has not moved."""
    name = error.name if isinstance(error, ImportError) else None
    return f"; {name} is now {MOVED[name]}" if name in MOVED else ""
