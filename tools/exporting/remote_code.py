"""A folder with the model's own code, taken from this project's sources, that transformers loads."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from lightning_modules.config import ModelConfig
from lightning_modules.transformer import Transformer
from spannorm import PLACEMENTS
from spannorm.import_path import is_import_path
from tools.exporting.flatten import flatten

MODELING = "tools.exporting.modeling_placement"


class Registry(NamedTuple):
    """Where the library looks a name up.

    Attributes:
        module: the module that defines the registry.
        name: the dictionary's name in it.
    """

    module: str
    name: str


PLACEMENT = Registry("spannorm.placements.registry", "PLACEMENTS")
NORM = Registry("spannorm.norms", "NORMS")


def write(model: Transformer, folder: Path, max_length: int, end_of_document: int | None) -> None:
    """config.json, model.safetensors, modeling_placement.py and the modules that it needs.

    Args:
        model: of any placement.
        folder: exists.
        max_length: tokens in a sequence of its training.
        end_of_document: the token that ends a text, and stands before one; None: there is none.
    """
    config = model.config
    code = sources(config)
    is_mixture = config.ffn == "moe"
    file = MODELING.rpartition(".")[2]
    description = {
        "model_type": "placement",
        "architectures": ["PlacementForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{file}.PlacementConfig",
            "AutoModelForCausalLM": f"{file}.PlacementForCausalLM",
        },
        "model": asdict(config),
        "output_multiplier": model.output_multiplier,
        "vocab_size": model.embedding.num_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "router_aux_loss_coef": config.moe.balance_weight / config.moe.top_k if is_mixture else 0.0,
        "router_z_loss_coef": config.moe.z_loss_weight if is_mixture else 0.0,
        "max_position_embeddings": max_length,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.dim,
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "use_cache": True,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    generation = {"bos_token_id": end_of_document, "eos_token_id": end_of_document}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    if config.tie_embeddings:
        del tensors["head.weight"]
    kept: dict[str, Tensor] = {f"model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    for name, text in code.items():
        (folder / f"{name}.py").write_text(text)


def sources(config: ModelConfig) -> dict[str, str]:
    """Return {file name without .py: source} of the modeling file and whatever it needs of this project and the user.

    Of all placements the folder holds the one. A placement and a norm kind by import path come along with their files
    and what these import of the user's own; what is installed has to be installed there as well.

    Raises:
        UserError: the user's file has an import that cannot be exported; says which, and what to write instead.
    """
    named = [(PLACEMENT, config.placement), (NORM, config.norm)]
    registrations = [_registration(registry, name) for registry, name in named if is_import_path(name)]

    def edit(module: str, source: str) -> str:
        if module == PLACEMENT.module:
            return _without_others(source, config.placement)
        return "".join([source, *registrations]) if module == MODELING else source

    flat = flatten(MODELING, edit)
    modeling = MODELING.rpartition(".")[2]
    others = "".join(f"from .{name} import __name__ as _\n" for name in sorted(flat) if name != modeling)
    flat[modeling] += f"\n\n# transformers brings along only what this file names.\n{others}"
    return flat


def _registration(registry: Registry, name: str) -> str:
    """Return the lines that enter the user's own class under its import path, at the end of the modeling file.

    There and not in the registry's module: the user's file may import that one.
    """
    module, _, attribute = name.rpartition(".")
    lines = f"from {registry.module} import {registry.name}\nfrom {module} import {attribute} as {registry.name}_OWN\n"
    return f'\n\n{lines}\n{registry.name}["{name}"] = {registry.name}_OWN\n'


def _without_others(source: str, placement: str) -> str:
    others = [scheme for name, scheme in PLACEMENTS.items() if name != placement]
    lines = [rf'from {re.escape(o.__module__)} import {o.__name__}\n|    "\w+": {o.__name__},\n' for o in others]
    return re.sub("|".join(lines), "", source)
