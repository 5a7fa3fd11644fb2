"""Types and bounds what a checkpoint says of its run, before anybody counts with it or makes a path of it."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from core.untrusted import Untrusted

STEPS = 1 << 53  # that a float still counts one by one
OF_NUMBERS = ("Divergence", "GradientHealth", "SignalPropagation", "Throughput")
"""Callbacks of this project that keep nothing else: a text among them would be found out when the run has begun."""
NUMBERS = ("schedule_steps", "run_summary")
"""Parts that this project adds to a checkpoint, and that are used only where training begins, or where it has ended."""
LISTED = ("values", "usual", "steps", "ratios")
"""What such a callback keeps a list of; as of a list's entries, the name of each ends in a number."""
STEPS_DONE = (
    (
        "loops",
        "fit_loop",
        "epoch_loop.automatic_optimization.optim_progress",
        "optimizer",
        "step",
        "total",
        "completed",
    ),
    ("loops", "fit_loop", "epoch_loop.manual_optimization.optim_step_progress", "total", "completed"),
)
PATHS = ("best_model_path", "kth_best_model_path", "last_model_path", "dirpath")  # of Lightning's ModelCheckpoint
ELSEWHERE = ("::", "://")
"""fsspec, which Lightning removes checkpoints by, takes such a path for an address: local:///home/me is one as well."""


def data_states(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the states of DataModules in a checkpoint, by class.

    Lightning keeps a DataModule's state under the name of its class; `stream_identity` marks those of this project.
    """
    return {name: state for name, state in content.items() if isinstance(state, dict) and "stream_identity" in state}


def checked(content: Any, folder: Path | None = None) -> dict[str, Any]:
    """Return the same content, of which each part that is there has the type that this project and Lightning give it.

    Args:
        content: of a checkpoint.
        folder: in which the checkpoint lies; None: it is in no file.

    Raises:
        Untrusted: names the part, what it is and what would be valid.
    """
    if not isinstance(content, dict):
        raise Untrusted(f"it holds a {type(content).__name__}, not the parts of a checkpoint")
    for name in ("global_step", "epoch"):
        if name in content:
            _count(name, content[name])
    for name in ("hyper_parameters", "callbacks", "loops", "state_dict", "run_summary"):
        if not isinstance(content.get(name, {}), dict):
            raise _wrong(name, content[name], "a group of values")
    for name, weight in content.get("state_dict", {}).items():
        if not isinstance(name, str) or not isinstance(weight, Tensor):
            raise _wrong(f"state_dict.{name}", weight, "a tensor")
    if "vocab_size" in content.get("hyper_parameters", {}):
        _count("hyper_parameters.vocab_size", content["hyper_parameters"]["vocab_size"])
    for name in NUMBERS:
        for part, value in _leaves(content.get(name), name):
            _check_number(part, value)
    for name, value in _leaves(content.get("loops", {}), "loops"):
        if not isinstance(value, bool | None):
            _count(name, value)
    _check_progress(content)
    for name, state in data_states(content).items():
        for part in ("samples", "step"):
            _count(f"{name}.{part}", state.get(part))
        if "global_step" in content and state["step"] != content["global_step"]:
            raise _wrong(f"{name}.step", state["step"], f"its global_step, {content['global_step']},")
    _check_schedulers(content.get("lr_schedulers", []))
    # A checkpoint in pieces has each optimizer's under a name of its own.
    in_pieces = {name: state for name, state in content.items() if re.fullmatch(r"optimizer_\d+", str(name))}
    listed = content.get("optimizer_states", [])
    if not isinstance(listed, list):
        raise _wrong("optimizer_states", listed, "a list of their states")
    for name, state in (*in_pieces.items(), *((f"optimizer_states.{n}", state) for n, state in enumerate(listed))):
        _check_optimizer(name, state)
    for name, state in content.get("callbacks", {}).items():
        # Not by its name, which is that of its class: the user's own may be a ModelCheckpoint too.
        if isinstance(state, dict) and not state.keys().isdisjoint((*PATHS, "best_k_models")):
            _check_paths(str(name), state, folder)
        elif name == "RandomState":
            _check_generators(state)
        elif name in OF_NUMBERS:
            for part, value in _leaves(state, f"callbacks.{name}"):
                _check_number(part, value)
    return content


def _check_schedulers(states: Any) -> None:
    """Hold their states against torch's classes, which take every value in one for an attribute, their methods too."""
    if not isinstance(states, list):
        raise _wrong("lr_schedulers", states, "a list of their states")
    for number, state in enumerate(states):
        where = f"lr_schedulers.{number}"
        if not isinstance(state, dict):
            raise _wrong(where, state, "a group of values")
        for name, value in state.items():
            part = f"{where}.{name}"
            if name == "optimizer" or callable(getattr(LambdaLR, str(name), None)):
                raise _wrong(part, value, "nothing")
            if name in ("last_epoch", "_step_count"):
                _count(part, value)
            elif name in ("base_lrs", "_last_lr"):
                if not isinstance(value, list | tuple):
                    raise _wrong(part, value, "a list of numbers")
                for each, rate in _leaves(value, part):
                    _check_number(each, rate)


def _check_progress(content: dict[str, Any]) -> None:
    """Hold the step that Lightning's loops count on from against the one that the checkpoint gives."""
    step = content.get("global_step")
    # One counts, of a module that leaves its optimization to Lightning and of one that does not.
    counts = [_at(content, path) for path in STEPS_DONE]
    if step is not None and counts != [None, None] and step not in counts:
        raise _wrong(".".join(STEPS_DONE[0]), counts[0], f"its global_step, {step},")


def _at(node: Any, path: Iterable[str]) -> Any:
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _check_optimizer(where: str, state: Any) -> None:
    """Hold the settings of each group of parameters, and what is kept of each parameter, against what optimizers keep.

    Whether a tensor is of its parameter's shape is found where it is used: core/interruption.py has the words for it.
    """
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise _wrong(f"{where}.param_groups", groups, "a list of groups")
    of_parameters = state.get("state", {})  # a checkpoint in pieces may have nothing but tensors in it
    if not isinstance(of_parameters, dict):
        raise _wrong(f"{where}.state", of_parameters, "a group of what is kept of each parameter")
    for name, kept in of_parameters.items():
        if not isinstance(kept, dict):
            raise _wrong(f"{where}.state.{name}", kept, "a group of values")
    for place, group in enumerate(groups):
        if not isinstance(group.get("params"), list):
            raise _wrong(f"{where}.param_groups.{place}.params", group.get("params"), "a list of parameters")
        betas = group.get("betas", (0.0, 0.0))
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            raise _wrong(f"{where}.param_groups.{place}.betas", betas, "two numbers")
        for name in ("lr", "initial_lr", "weight_decay", "eps", "betas", "momentum"):
            for part, value in _leaves(group.get(name), f"{where}.param_groups.{place}.{name}"):
                _check_number(part, value)
                if isinstance(value, Tensor) and value.numel() != 1:
                    raise _wrong(part, value, "a number")


def _check_generators(state: Any) -> None:
    """Hold each state of a generator against what torch takes: it is restored when the run has begun."""
    where = "callbacks.RandomState"
    ranks = state.get("parts", state.get("ranks")) if isinstance(state, dict) else None
    if not isinstance(ranks, list) or not all(isinstance(rank, dict) for rank in ranks):
        raise _wrong(where, state, "a list of the processes' generators")
    for number, rank in enumerate(ranks):
        for kind, generator in rank.items():
            part = f"{where}.{number}.{kind}"
            if not isinstance(generator, Tensor) or generator.dtype != torch.uint8 or generator.ndim != 1:
                raise _wrong(part, generator, "the state of a generator")
            if kind == "cpu":
                try:
                    torch.Generator().set_state(generator.cpu())
                except RuntimeError as error:
                    raise _wrong(part, generator, "the state of a generator") from error


def _check_number(name: str, value: Any) -> None:
    listed = name.rpartition(".")[2] in LISTED
    if listed or not isinstance(value, int | float | Tensor | None):
        raise _wrong(name, value, "a list of numbers" if listed else "a number")


def _check_paths(name: str, state: dict[Any, Any], folder: Path | None) -> None:
    """Refuse paths out of the folder of checkpoints: Lightning removes there what is worse than the best.

    That folder is the one that the state names, wherever its run lies today. In another one Lightning takes over
    best_model_path alone: once a run has moved, that may lead into its old folder, and nothing is removed there.
    """
    best = state.get("best_k_models", {})
    if not isinstance(best, dict):
        raise _wrong(f"callbacks.{name}.best_k_models", best, "a group of values")
    named = [(key, state[key]) for key in PATHS if state.get(key) is not None]
    named += [("best_k_models", path) for path in best]
    for key, path in named:
        is_plain = isinstance(path, str) and "\0" not in path and not any(sign in path for sign in ELSEWHERE)
        if not is_plain or ".." in Path(path).parts:
            raise _wrong(f"callbacks.{name[:60]}.{key}", path, "the path of a checkpoint, without .., :: or ://,")
    home = state.get("dirpath")
    if home is None and folder is not None:
        home = os.path.realpath(folder)
    has_moved = state.get("dirpath") is not None and not best and not state.get("kth_best_model_path")
    for key, path in named:
        if key == "dirpath" or not path or (key == "best_model_path" and has_moved):
            continue
        # Lightning looks no closer: it follows no links.
        if home is None or Path(home).absolute() not in Path(path).absolute().parents:
            raise _wrong(f"callbacks.{name[:60]}.{key}", path, f"a path below {home or 'its dirpath'}")


def _count(name: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value < STEPS:
        raise _wrong(name, value, "an integer in [0, 2**53)")


def _wrong(name: str, value: Any, valid: str) -> Untrusted:
    short = isinstance(value, str | float | None) or (isinstance(value, int) and value.bit_length() < 1000)
    # Python refuses to write out an integer of over 4,300 digits.
    shown = repr(value)[:60] if short else f"a {type(value).__name__}"
    return Untrusted(f"its {name[:100]} is {shown}, where {valid} should be")


def _leaves(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{name}.{key}")
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _leaves(value, f"{name}.{number}")
    else:
        yield name, node
