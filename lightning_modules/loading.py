"""Makes a LightningModule of what was saved of one, as data: nothing that the file names is run unasked."""

import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import torch

from core.checkpoint import load
from core.errors import ConfigError, one_line, require
from core.options import accepts
from core.saved_config import refuse_foreign_values
from core.sharded_checkpoint import open_safetensors
from core.untrusted import Untrusted, parse_json

M = TypeVar("M")

FIELD = "checkpoint_path"
VALID = "a checkpoint of one file or in pieces, a run's folder, or a file of tools.consolidate"
PREFIX = "model."


def load_module(
    kind: type[M],
    path: str | Path,
    device: torch.device | str | None,
    strict: bool | None,
    allow: Collection[str],
    given: dict[str, Any],
) -> M:
    """Return a LanguageModule with the weights of a checkpoint. See LanguageModule.load_from_checkpoint.

    Args:
        kind: LanguageModule, or a class derived from it.
        path: of the checkpoint.
        device: of the module; None: the host.
        strict: whether all weights have to correspond; None: as `kind.strict_loading` says.
        allow: import paths that the hyperparameters may name.
        given: hyperparameters in the place of saved ones.

    Raises:
        ConfigError: it is no checkpoint, names foreign code, or has other weights than its hyperparameters say.
    """
    valid = "a device, as cpu or cuda:0: weights are read on the host, wherever they were saved"
    require(device is None or isinstance(device, str | torch.device), "map_location", device, valid)
    content = read(Path(path))
    saved, weights = content["hyper_parameters"], content["state_dict"]
    refuse_foreign_values({name: value for name, value in saved.items() if name not in given}, allow)
    arguments = {**saved, **given}
    parameters = inspect.signature(kind).parameters
    wanted = [name for name, parameter in parameters.items() if _is_needed(parameter)]
    for name in dict.fromkeys(("model", "optim", *wanted)):
        type_ = dict if name in ("model", "optim") else parameters[name].annotation
        fits = name in arguments and accepts(type_, arguments[name])
        require(fits, FIELD, str(path), f"{VALID}, with the hyperparameter {name}")
    # A block has weights of its own: what describes more layers than that is not even looked over.
    layers = arguments["model"].get("num_layers", 0)
    fits = "model" in given or (type(layers) is int and layers <= len(weights))
    require(fits, FIELD, str(path), "a checkpoint with the weights of all layers that it describes")
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    module: Any = kind(**{name: value for name, value in arguments.items() if takes_any or name in parameters})
    strict = module.strict_loading if strict is None else strict
    there = sum(weight.numel() for weight in weights.values())
    valid = (
        f"a checkpoint with at least {module.num_parameters[0]:,} weights, as its hyperparameters say, not {there:,}"
    )
    require(not strict or module.num_parameters[0] <= there, FIELD, str(path), valid)
    with torch.device(device or "cpu"):
        module.configure_model()
    module.on_load_checkpoint(content)
    try:
        module.load_state_dict(weights, strict=strict)
    except RuntimeError as error:
        raise ConfigError(FIELD, str(path), f"a checkpoint of the same model ({one_line(error)[:500]})") from error
    loaded: M = module.to(device or "cpu")
    return loaded


def _is_needed(parameter: inspect.Parameter) -> bool:
    collecting = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return not collecting and parameter.default is inspect.Parameter.empty


def read(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside its optimizer: hyper_parameters, state_dict, and what else is there.

    Raises:
        ConfigError: it is not there, or cannot be read as one.
    """
    require(path.exists(), FIELD, str(path), VALID)
    try:
        if path.is_file() and path.suffix == ".safetensors":
            content = _read_consolidated(path)
        else:
            last = path / "checkpoints/last.ckpt"
            content = load(last if last.exists() else path)
        present = isinstance(content.get("hyper_parameters"), dict) and isinstance(content.get("state_dict"), dict)
        require(present, FIELD, str(path), f"{VALID}, with hyper_parameters and state_dict")
    except ConfigError:
        raise
    except Exception as error:  # truncated, no checkpoint at all, or one with code in it
        raise ConfigError(FIELD, str(path), f"{VALID}; it cannot be read as one ({one_line(error)})") from error
    return {name: value for name, value in content.items() if not name.startswith("optimizer_")}


def _read_consolidated(path: Path) -> dict[str, Any]:
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        if "hyper_parameters" not in metadata:
            raise Untrusted(f"{path.name} says nothing of hyper_parameters")
        hyper_parameters = parse_json(metadata["hyper_parameters"], path, dict[str, Any])
        weights = {f"{PREFIX}{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = hyper_parameters.get("model")
    if isinstance(model, dict) and model.get("tie_embeddings") and f"{PREFIX}embedding.weight" in weights:
        weights[f"{PREFIX}head.weight"] = weights[f"{PREFIX}embedding.weight"]  # the file has it once
    return {"hyper_parameters": hyper_parameters, "state_dict": weights}
