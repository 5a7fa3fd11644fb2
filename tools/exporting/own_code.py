"""A folder with the model's own code, taken from this project's sources, that transformers loads."""

import ast
import json
import re
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lightning_modules.placements.registry import PLACEMENTS
from lightning_modules.transformer import Transformer

ROOT = Path(__file__).resolve().parents[2]
MODELING, REGISTRY = "tools.exporting.modeling_placement", "lightning_modules.placements.registry"
IMPORT = re.compile(r"^( *)from ([\w.]+) import ([^\n]*)", re.MULTILINE)


def write(model: Transformer, folder: Path, max_length: int, end_of_document: int | None) -> None:
    """config.json, model.safetensors, modeling_placement.py and the modules that it needs.

    Args:
        model: of any placement.
        folder: exists.
        max_length: tokens in a sequence of its training.
        end_of_document: the token that ends a text, and stands before one; None: there is none.
    """
    config = model.config
    is_mixture = config.ffn == "moe"
    code = MODELING.rpartition(".")[2]
    description = {
        "model_type": "placement",
        "architectures": ["PlacementForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{code}.PlacementConfig",
            "AutoModelForCausalLM": f"{code}.PlacementForCausalLM",
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
    for name, text in sources(config.placement).items():
        (folder / f"{name}.py").write_text(text)


def sources(placement: str) -> dict[str, str]:
    """{file name without .py: content} of the modeling file and whatever it imports of this project.

    The folder is flat, and imports in it are relative. Of all placements it holds the one.
    """
    texts: dict[str, str] = {}
    waiting = [MODELING]
    while waiting:
        module = waiting.pop()
        if module not in texts:
            texts[module] = _source(module, placement)
            waiting += _imported(texts[module])
    flat = {_flat(module): IMPORT.sub(_relative, text) for module, text in texts.items()}
    named = "".join(f"from .{name} import __name__ as _\n" for name in sorted(flat) if name != _flat(MODELING))
    flat[_flat(MODELING)] += f"\n\n# transformers brings along only what this file names.\n{named}"
    return flat


def _source(module: str, placement: str) -> str:
    text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    if module != REGISTRY:
        return text
    others = [scheme for name, scheme in PLACEMENTS.items() if name != placement]
    lines = [rf'from {re.escape(o.__module__)} import {o.__name__}\n|    "\w+": {o.__name__},\n' for o in others]
    return re.sub("|".join(lines), "", text)


def _imported(text: str) -> set[str]:
    """The project's modules that a source imports."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name for name in (*names, node.module) if _is_ours(name)}
    return found


def _is_ours(module: str) -> bool:
    return (ROOT / f"{module.replace('.', '/')}.py").is_file()


def _flat(module: str) -> str:
    return module.removeprefix("tools.exporting.").replace(".", "_")


def _relative(match: re.Match[str]) -> str:
    indent, module, names = match.groups()
    if _is_ours(module):
        return f"{indent}from .{_flat(module)} import {names}"
    parts = {name: f"{module}.{name}" for name in names.split(", ")}
    if all(map(_is_ours, parts.values())):
        return f"{indent}from . import " + ", ".join(f"{_flat(part)} as {name}" for name, part in parts.items())
    return match[0]
