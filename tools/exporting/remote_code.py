"""A folder with a model's own code that transformers loads.

The code is one hand-written modeling file with its configuration, beside the part of the library spannorm that the
model needs, and the user's own file where it names a placement or a norm kind of theirs.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.atomic_write import save_tensors
from lightning_modules.config import ModelConfig
from lightning_modules.transformer import Transformer
from lightning_modules.trunk import Trunk
from spannorm import PLACEMENTS
from spannorm.import_path import is_import_path
from tools.exporting import own_files
from tools.exporting.description import dtype_name, sizes_of, write_descriptions
from tools.exporting.folded_weights import folded_weights
from tools.exporting.library_file import LIBRARY, sort_names

FILE = "modeling_placement"
MODELING = f"{__package__}.{FILE}"
IMPORT = "from spannorm import PLACEMENTS, Depth, InvalidArgument, NormFactory, Placement\n"
"""What the modeling file imports of this project; in the folder it imports the one placement in place of all."""


def write(
    model: Transformer,
    folder: Path,
    max_length: int,
    end_of_document: int | None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write config.json, generation_config.json, model.safetensors and the code.

    Args:
        model: of any placement.
        folder: exists.
        max_length: tokens in a sequence of its training.
        end_of_document: the token that ends a text, and stands before one; None: there is none.
        dtype: of the parameters; buffers keep theirs.

    Raises:
        UserError: the user's file has an import that cannot be exported; says which, and what to write instead.
    """
    code = sources(model.config)
    ends = {"bos_token_id": end_of_document, "eos_token_id": end_of_document}
    description = {
        "model_type": "placement",
        "architectures": ["PlacementForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{FILE}.PlacementConfig",
            "AutoModelForCausalLM": f"{FILE}.PlacementForCausalLM",
        },
        **configuration(model),
        "max_position_embeddings": max_length,
        **ends,
        "use_cache": True,
        "dtype": dtype_name(dtype),
    }
    write_descriptions(folder, description, ends)
    save_tensors(weights(model, dtype), folder / "model.safetensors", {"format": "pt"})
    for name, text in code.items():
        (folder / f"{name}.py").write_text(text, "utf-8")


def configuration(model: Trunk) -> dict[str, Any]:
    """Return the arguments of PlacementConfig that describe a model."""
    config, moe = model.config, model.config.moe
    described: dict[str, Any] = {
        **sizes_of(model),
        "qk_norm": config.qk_norm,
        "qkv_bias": config.qkv_bias,
        "bias": config.bias,
        "causal": config.causal,
        "hidden_act": "gelu" if config.ffn == "mlp" else "silu",
        "rope_theta": config.rope_theta,
        "placement": config.placement,
        "placement_options": config.placement_options,
        "norm": config.norm,
        "norm_options": config.norm_options,
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "output_multiplier": model.output_multiplier,
    }
    if config.ffn != "moe":
        return described
    return {
        **described,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": config.expert_hidden_dim,
        "first_dense_layers": moe.first_dense_layers,
        "moe_layer_interval": moe.layer_interval,
        "num_shared_experts": moe.num_shared_experts,
        "shared_expert_intermediate_size": config.shared_expert_hidden_dim,
        "shared_expert_weighted_sum": moe.shared_expert_weighted_sum,
        "router_score": moe.score,
        "router_bias": moe.balancing == "bias",
        "norm_topk_prob": moe.normalizes_weights,
        "router_jitter_noise": moe.jitter,
        "router_aux_loss_coef": moe.balance_weight / moe.top_k,
        "router_z_loss_coef": moe.z_loss_weight,
    }


def weights(model: Trunk, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the weights by the names that they have in PlacementForCausalLM, constants of placements among them.

    Args:
        dtype: of the parameters; None: as they are.
    """
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in folded_weights(model).items()}
    tensors.update(model.named_buffers())
    if model.config.tie_embeddings:
        del tensors["head.weight"]
    return {f"model.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def sources(config: ModelConfig, entry: str = MODELING) -> dict[str, str]:
    """Return {file name without .py: source} of the modeling file and whatever it needs of this project and the user.

    Of all placements there is the one. A placement and a norm kind by import path come along with their files and what
    these import of the user's own; what is installed has to be installed there as well.

    Args:
        config: of the blocks.
        entry: the module that transformers is told of.

    Raises:
        UserError: the user's file has an import that cannot be exported; says which, and what to write instead.
    """
    source = Path(own_files.ROOT, *MODELING.split(".")).with_suffix(".py").read_text("utf-8")
    assert source.count(IMPORT) == 1
    library = {"Depth", "InvalidArgument", "NormFactory", "Placement"}
    own, lines = [], []
    if is_import_path(config.placement):
        own.append(_import(config.placement, "OwnPlacement"))
        lines.append(f'PLACEMENTS = {{"{config.placement}": OwnPlacement}}')
    else:
        placement = PLACEMENTS[config.placement].__name__
        library.add(placement)
        lines.append(f'PLACEMENTS = {{"{config.placement}": {placement}}}')
    if is_import_path(config.norm):
        library.add("NORMS")
        own.append(_import(config.norm, "OwnNorm"))
        lines.append(f'NORMS["{config.norm}"] = OwnNorm')
    imports = [*sorted(own), f"from {LIBRARY} import {', '.join(sort_names(library))}"]
    replaced = {MODELING: source.replace(IMPORT, "\n".join([*imports, "", *lines, ""]))}
    files, file = own_files.collect(entry, replaced), entry.rpartition(".")[2]
    # Of a local folder, transformers 4 takes only the files that the modeling file itself names.
    named = {line.split()[1].removeprefix(".") for line in files[file].splitlines() if line.startswith("from .")}
    others = sorted(files.keys() - named - {file})
    if others:
        reason = "# transformers brings along only the files that are named here."
        files[file] += (
            "\n\n".join(["", reason]) + "".join(f"\nfrom .{name} import __name__ as _" for name in others) + "\n"
        )
    return files


def _import(path: str, bound: str) -> str:
    module, _, name = path.rpartition(".")
    return f"from {module} import {name} as {bound}"
