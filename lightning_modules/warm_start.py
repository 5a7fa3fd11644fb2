"""Starts a model from weights that were trained before: another run's, a safetensors file's, a folder of transformers.

Every parameter of the model gets the weights of its name. A placement, and the norms that it asks for inside attention
and FFN, may have parameters without a counterpart: these start as the init says. All else has to correspond, name by
name and shape by shape, so that nothing is left out silently. What a source says of its model is read by `model_of`.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from core.checkpoint import load, load_beside_weights
from core.errors import ConfigError, one_line, require
from core.moved import with_current_fields
from core.printable import printable
from core.sharded_checkpoint import open_safetensors
from core.untrusted import Untrusted, parse_json
from lightning_modules.config import ModelConfig, OptimConfig, parse
from lightning_modules.pretrained.families import Pretrained, fields_of, find_pretrained
from lightning_modules.pretrained.weights import INDEX, WHOLE, files_of, read_weights
from lightning_modules.trunk import Trunk
from lightning_modules.width_scaling import WidthScaling, width_scaling

FIELD = "init_from"
VALID = (
    "a run's folder, a checkpoint, a safetensors file, or a folder with model.safetensors or its index, of this "
    "project's names or with a config.json of transformers"
)
OF_PLACEMENT = re.compile(
    r"blocks\.\d+\.(placement|embedding_scale|attn\.(projection_norms|inner_norm)|ffn\.([a-z_.]+\.)?inner_norm)\."
)
"""Parameters that another placement, or kind of norm, need not have."""
MAY_DIFFER = {"placement", "placement_options", "norm", "norm_options", "qk_norm", "moe.load_balancing_weight"}
"""Of a folder of transformers, what a model that starts from it may have otherwise."""
NOT_INHERITED = {
    "init",
    "init_options",
    "init_truncation",
    "compile",
    "cpu_kernels",
    "activation_checkpointing",
    "activation_checkpoint_every",
    "moe.backend",
    "moe.expert_parallel",
    "moe.jitter",
    "moe.load_balancing_weight",
    "moe.bias_update_rate",
    "moe.z_loss_weight",
}
"""Fields of `model` that say how to compute or to train, and nothing of what the weights belong to."""


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


def model_of(source: Path) -> dict[str, Any] | None:
    """Return the fields of `model` that a source of weights was made with, those of `model.moe` as moe.NAME.

    Args:
        source: as of `warm_start`; also a checkpoint, of which the weights are not read.

    Returns:
        Plain values of what is the architecture; None: the source says nothing of it.

    Raises:
        ConfigError: it is no source, or one of transformers that this project's model is not.
    """
    pretrained = _pretrained(source)
    if pretrained is not None:
        return {name: value for name, value in fields_of(pretrained.model) if name not in NOT_INHERITED}
    config = _saved_model(source)
    if config is None:
        return None
    values = {**vars(config), "moe": vars(config.moe)}
    return {name: value for name, value in fields_of(values) if name not in NOT_INHERITED}


def data_of(source: Path, names: Iterable[str]) -> dict[str, int]:
    """Return what a source says of its data: those of these numbers, as vocab_size, that it knows.

    Raises:
        ConfigError: see model_of.
    """
    pretrained = _pretrained(source)
    said = _hyper_parameters(source) if pretrained is None else pretrained.model
    return {name: said[name] for name in names if isinstance(said.get(name), int)}


def _saved_model(source: Path) -> ModelConfig | None:
    """Return the configuration that a source of this project's names has beside its weights; None: it has none."""
    saved = _hyper_parameters(source).get("model")
    known = {field.name for field in fields(ModelConfig)}
    if not isinstance(saved, dict) or not with_current_fields(saved, "model").keys() <= known:
        return None  # a LightningModule of the user's own
    return parse(ModelConfig, "model", saved)


def _hyper_parameters(source: Path) -> dict[str, Any]:
    """Return what a checkpoint, or a file of tools.consolidate, says of its module; an export says nothing."""
    try:
        if not _is_safetensors(source):
            found: dict[str, Any] = load_beside_weights(_checkpoint(source)).get("hyper_parameters", {})
            return found
        whole = source if source.is_file() else source / WHOLE
        if not whole.is_file():
            return {}
        with open_safetensors(whole) as file:
            said = (file.metadata() or {}).get("hyper_parameters")
        parsed: dict[str, Any] = {} if said is None else parse_json(said, whole, dict[str, Any])
        return parsed
    except Exception as error:  # truncated, no checkpoint at all, or one with code in it
        raise _unreadable(source, error) from error


def warm_start(source: str | Path, model: Trunk) -> WarmStart:
    """Read weights and hold them against a model.

    Args:
        source: RUN (its last checkpoint), a checkpoint of one file or in pieces, a file of tools.consolidate, a folder
            of tools.export, or one of transformers.
        model: the Transformer that is to start from them; one on the meta device will do.

    Raises:
        ConfigError: `init_from` is nothing of that, cannot be read, or is of a model of other sizes.
    """
    path = Path(source)
    weights = _read(path, model)
    # A tied head is the embedding once more, and need not be in a file.
    own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    tied = {name for name, tensor in own.items() if name == "head.weight" and tensor is own["embedding.weight"]}
    # MixLN keeps the norms of each block's placement one level further down.
    here_as = {name.replace(".placement.inner.", ".placement."): name for name in own}
    weights = {here_as.get(name.replace(".placement.inner.", ".placement."), name): w for name, w in weights.items()}
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


def check_logits(source: str | Path, scaling: WidthScaling) -> None:
    """Refuse weights whose logits were multiplied by another number, which no shape tells.

    Args:
        source: as of `warm_start`; of an export with its own code nothing is known.
        scaling: of the model that is to start from it.

    Raises:
        ConfigError: the width scaling of the source gives another multiplier.
    """
    path = Path(source)
    if _pretrained(path) is not None:
        theirs, said = 1.0, "none or standard"
    else:
        model, optim = _saved_model(path), _hyper_parameters(path).get("optim")
        if model is None or not isinstance(optim, dict):
            return
        names = ("width_scaling", "base_width", "base_ffn_width")
        saved = parse(OptimConfig, "optim", {name: optim[name] for name in names if name in optim})
        theirs = width_scaling(model, saved).output_multiplier
        said = f"{saved.width_scaling!r}"
        said += f" with optim.base_width={saved.base_width}" if saved.width_scaling != "none" else ""
    here = scaling.output_multiplier
    valid = (
        f"{said}, as of {printable(path, limit=None)}: its logits are multiplied by {theirs:g}, and here by {here:g}"
    )
    require(math.isclose(here, theirs), "optim.width_scaling", scaling.kind, valid)


def _pretrained(path: Path) -> Pretrained | None:
    require(path.exists(), FIELD, str(path), VALID)
    return find_pretrained(path) if path.is_dir() else None


def _is_safetensors(path: Path) -> bool:
    """Return whether a source is a file of safetensors, or a folder with some, rather than a checkpoint."""
    return path.suffix == ".safetensors" or any((path / name).is_file() for name in (WHOLE, INDEX))


def _checkpoint(path: Path) -> Path:
    last = path / "checkpoints/last.ckpt"
    return last if last.exists() else path


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(FIELD, str(path), f"{VALID}; it cannot be read as one ({one_line(error)})")


def _read(path: Path, model: Trunk) -> dict[str, Tensor]:
    """Return the weights by the names of a Transformer's parameters, of a model that may be this one."""
    pretrained = _pretrained(path)
    if pretrained is not None:
        theirs = parse(ModelConfig, "model", pretrained.model)
        names = [name for name, _ in fields_of(pretrained.model) if name not in MAY_DIFFER]
        _check_same(model, theirs, names, path / "config.json")
        return read_weights(pretrained)
    if (saved := _saved_model(path)) is not None:  # of few wide heads and of many narrow ones the shapes are the same
        _check_same(model, saved, ["num_heads"], path)
    try:
        if _is_safetensors(path):
            weights = _read_files([path] if path.is_file() else files_of(path))
        else:
            weights = load(_checkpoint(path))["state_dict"]
        return {name.removeprefix("model."): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    except ConfigError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def _check_same(model: Trunk, theirs: ModelConfig, names: Iterable[str], where: Path) -> None:
    """Raise ConfigError at the first of some fields of `model` in which the source of the weights differs."""
    for name in names:
        here, there = _in_effect(model.config, name), _in_effect(theirs, name)
        if name == "vocab_size":
            here = getattr(model.embedding, "num_embeddings", None)
        require(here == there, f"model.{name}", here, f"{there!r}, as in {printable(where, limit=None)}")


def _in_effect(config: ModelConfig, name: str) -> Any:
    """Return a field's value, or what its null stands for."""
    special = {
        "num_kv_heads": config.kv_heads,
        "head_dim": config.head_width,
        "ffn_dim": config.hidden_dim if config.hidden_dim in config.hidden_dims else None,
        "moe.expert_dim": config.expert_hidden_dim,
        "moe.normalize_weights": config.moe.normalizes_weights,
    }
    if name in special:
        return special[name]
    return getattr(config.moe if name.startswith("moe.") else config, name.rpartition(".")[2])


def _read_files(paths: list[Path]) -> dict[str, Tensor]:
    weights = {}
    for path in paths:
        try:
            with open_safetensors(path) as file:
                weights.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise Untrusted(f"{path.name}: {one_line(error)}") from error
    return weights
