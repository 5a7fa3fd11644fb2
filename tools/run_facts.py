"""Reads what a run says of itself, as one flat mapping: its settings, and where it comes from."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.run_folder import flatten, of_last_process
from core.status import read_origin
from core.untrusted import Untrusted, read_yaml

MAX_SETTINGS = 10_000
"""Of one run; this project's have some 200."""
OF_THE_RUN_ALONE = ("run_dir", "ckpt_path", "save_dir", "dirpath", "command")
"""Settings, of whatever part, and origins that any two runs may differ in without being different jobs."""
OUTPUT = ("logger", "blocks", "trainer.profiler", "trainer.enable_progress_bar", "trainer.enable_model_summary")
"""Settings, alone or with all below them, of what a run shows of its training and where it writes that."""
OUTPUT_CALLBACKS = "callbacks.console."
"""The package of the callbacks that do the same."""


def facts(folder: Path) -> dict[str, Any]:
    """Return {name: value}: settings as in its configuration (model.dim), then commit, torch, command and the like.

    All is read as data. What is not there, or cannot be read, is left out.
    """
    return {**_settings(folder), **read_origin(folder)}


def _settings(folder: Path) -> dict[str, Any]:
    """Return those of the process that trained it last, as read_origin does; what a resume changes is what counts."""
    try:
        config = read_yaml(of_last_process(folder, "config.yaml"))
    except (Untrusted, OSError):
        return {}
    found = flatten(config, ".") if isinstance(config, Mapping) and _is_plain(config) else {}
    # The module's own group repeats model and optim.
    found = {
        name: v for name, v in found.items() if not (name.startswith("module.") and name[len("module.") :] in found)
    }
    return found if len(found) <= MAX_SETTINGS else {}


def _is_plain(config: Mapping[Any, Any]) -> bool:
    """Return whether all keys are text, which `flatten` joins."""
    return all(isinstance(key, str) and (not isinstance(v, Mapping) or _is_plain(v)) for key, v in config.items())


def differences(runs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return {name: its value in each run}, of what is not the same in all; None where a run does not have it.

    Folders are left out, which are never the same, and so is what changes nothing of the training: loggers, profilers
    and the callbacks of the console.
    """
    output = {*OUTPUT, *(callback for run in runs for callback in _output_callbacks(run))}
    names = dict.fromkeys(name for run in runs for name in run if name.rpartition(".")[2] not in OF_THE_RUN_ALONE)
    values = {name: [run.get(name) for run in runs] for name in names if output.isdisjoint(_with_parents(name))}
    return {name: these for name, these in values.items() if any(value != these[0] for value in these[1:])}


def _output_callbacks(run: Mapping[str, Any]) -> Iterator[str]:
    for name, value in run.items():
        if name.startswith("callbacks.") and name.endswith("._target_") and str(value).startswith(OUTPUT_CALLBACKS):
            yield name.removesuffix("._target_")


def _with_parents(name: str) -> list[str]:
    """Return the setting's name, and of `a.b.c` also a.b and a."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def as_text(value: Any) -> str:
    """Return a setting as one would write it on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
