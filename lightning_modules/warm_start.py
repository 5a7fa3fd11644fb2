"""Starts a model from weights that were trained before: another run's, or those of a safetensors file.

Every parameter of the model gets the weights of its name. A placement, and the norms that it asks for inside attention
and FFN, may have parameters without a counterpart: these start as the init says. All else has to correspond, name by
name and shape by shape, so that nothing is left out silently.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from core.checkpoint import load
from core.errors import ConfigError, one_line, require
from core.printable import printable
from core.sharded_checkpoint import open_safetensors
from core.untrusted import MIB, Untrusted, read_json

FIELD = "init_from"
VALID = (
    "a run's folder, a checkpoint, a safetensors file, or a folder with model.safetensors or its index, with this "
    "project's names"
)
OF_PLACEMENT = re.compile(
    r"blocks\.\d+\.(placement|embedding_scale|attn\.(projection_norms|inner_norm)|ffn\.([a-z_.]+\.)?inner_norm)\."
)
"""Parameters that another placement, or kind of norm, need not have."""
MAX_INDEX = 64 * MIB


@dataclass(frozen=True)
class WarmStart:
    """Weights to start from, held against a model.

    Attributes:
        source: where they come from.
        weights: by name, on the host; those that are taken.
        new: names of the model's parameters that start as the init says.
        unused: names of weights that the model has no place for.
    """

    source: Path
    weights: dict[str, Tensor]
    new: list[str]
    unused: list[str]

    def __str__(self) -> str:
        said = [f"Started from {printable(self.source, limit=None)}: {len(self.weights)} tensors"]
        said += [f"as the init says: {', '.join(self.new)}"] if self.new else []
        said += [f"not taken: {', '.join(map(printable, self.unused))}"] if self.unused else []
        return "; ".join(said)

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Copy the weights into a model, whole or sharded: each process keeps its part of every tensor."""
        for name, own in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            if name not in self.weights:
                continue
            value: Any = self.weights[name].to(own.device, own.dtype)
            if isinstance(own, DTensor):
                value = distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
            own.copy_(value)


def warm_start(source: str | Path, model: nn.Module) -> WarmStart:
    """Read weights and hold them against a model.

    Args:
        source: RUN (its last checkpoint), a checkpoint of one file or in pieces, a file of tools.consolidate, or a
            folder of tools.export.
        model: the Transformer that is to start from them; one on the meta device will do.

    Raises:
        ConfigError: `init_from` is nothing of that, cannot be read, or is of a model of other sizes.
    """
    path = Path(source)
    weights = _read(path)
    # A tied head is the embedding once more, and need not be in a file.
    own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    tied = {name for name, tensor in own.items() if name == "head.weight" and tensor is own["embedding.weight"]}
    taken = {}
    for name in own:
        there, here = weights.get(name), own[name]
        if there is not None and not there.is_floating_point():
            raise ConfigError(FIELD, str(source), f"weights in floating point: {name} is {there.dtype} in the source")
        if there is not None and there.shape == here.shape:
            taken[name] = there
        elif not OF_PLACEMENT.match(name) and name not in tied:
            has = "has none" if there is None else f"has {list(there.shape)}"
            valid = f"weights of a model of the same sizes: {name} is {list(here.shape)} here, and the source {has}"
            raise ConfigError(FIELD, str(source), valid)
    unused = sorted(weights.keys() - taken.keys())
    foreign = [name for name in unused if not OF_PLACEMENT.match(name)]
    valid = f"weights of a model of the same sizes: there is no {', '.join(map(printable, foreign[:3]))} here"
    require(not foreign, FIELD, str(source), valid)
    return WarmStart(path, taken, sorted(own.keys() - taken.keys() - tied), unused)


def _read(path: Path) -> dict[str, Tensor]:
    """Return the weights by the names of a Transformer's parameters."""
    require(path.exists(), FIELD, str(path), VALID)
    try:
        if path.is_file() and path.suffix == ".safetensors":
            weights = _read_files([path])
        elif (path / "model.safetensors").is_file():
            weights = _read_files([path / "model.safetensors"])
        elif (index := path / "model.safetensors.index.json").is_file():
            weights = _read_files(sorted({path / name for name in _files_of(index)}))
        else:
            checkpoint = path / "checkpoints/last.ckpt"
            weights = load(checkpoint if checkpoint.exists() else path)["state_dict"]
        return {name.removeprefix("model."): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    except ConfigError:
        raise
    except Exception as error:  # truncated, no checkpoint at all, or one with code in it
        raise ConfigError(FIELD, str(path), f"{VALID}; it cannot be read as one ({one_line(error)})") from error


def _files_of(index: Path) -> set[str]:
    content = read_json(index, limit=MAX_INDEX)
    names = content.get("weight_map") if isinstance(content, dict) else None
    files = set(names.values()) if isinstance(names, dict) else set()
    if not files or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in files):
        raise Untrusted(f"{index.name} has no weight_map of names of files beside it")
    return files


def _read_files(paths: list[Path]) -> dict[str, Tensor]:
    weights = {}
    for path in paths:
        try:
            with open_safetensors(path) as file:
                weights.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise Untrusted(f"{path.name}: {one_line(error)}") from error
    return weights
