"""Writes a folder of transformers as a run at step 0; `python -m tools.import` is its command line."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from core.atomic_write import save
from core.build import build
from core.errors import ConfigError, require, writing
from core.open_run import IMPORTED
from core.run_folder import LAST, OVERRIDES
from core.status import DONE
from core.status import FILE as STATUS
from datamodules.preparation.bpe import make_tokenizer
from datamodules.tokenizer_folder import FILE as TOKENIZER
from datamodules.tokenizer_folder import read_tokenizer_file
from lightning_modules.composing import compose_run, inherit_model
from lightning_modules.pretrained.families import FAMILIES, Pretrained, find_pretrained
from lightning_modules.transformer import Transformer
from lightning_modules.warm_start import warm_start

LENGTH = 2048
"""Tokens that a model reads at once which does not say how many."""
BATCH_TOKENS = 1 << 14


def make_run(folder: Path, output: Path, seq_len: int | None = None, end_of_document: str | None = None) -> str:
    """Write the run; says in a line what it holds. What fails leaves nothing behind.

    Args:
        folder: of transformers.
        output: the run's folder, which is made.
        seq_len: tokens that the model reads at once; None: what its config.json says.
        end_of_document: the token that ends a text; None: what the folder's files say.

    Raises:
        ConfigError: the folder is none that can be read, or the output is there already or cannot be made.
    """
    pretrained = find_pretrained(folder) if folder.is_dir() else None
    valid = f"a folder of transformers with a config.json whose model_type is one of {', '.join(FAMILIES)}"
    if pretrained is None:
        raise ConfigError("FOLDER", str(folder), valid)
    require(not output.exists(), "output", str(output), "a new folder: this one is there already")
    content = read_tokenizer_file(folder, "FOLDER")
    if content is None:
        valid = f"null: {folder} has no {TOKENIZER}, and its tokens are numbers"
        require(end_of_document is None, "end_of_document", end_of_document, valid)
    config = _configuration(pretrained, seq_len, content, end_of_document)
    module = build(config, "module", vocab_size=build(config, "data").vocab_size)
    with torch.device("meta"):
        weightless = Transformer(module.model_config, module.vocab_size)
    weights = warm_start(folder, weightless).weights
    if module.model_config.tie_embeddings:
        weights["head.weight"] = weights["embedding.weight"]
    config.data.path = config.run_dir = str(output)
    with writing("output", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            _write(scratch, config, {f"model.{name}": weights[name] for name in weightless.state_dict()}, module)
            if content is not None:
                (scratch / TOKENIZER).write_bytes(content)
            scratch.chmod(0o755)
            scratch.rename(output)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
    parameters = f"{module.num_parameters[0]:,} parameters in {' and '.join(types)}"
    without = "" if content is not None else f"; no {TOKENIZER}, so its tokens are numbers"
    return f"{output}: {pretrained.family.architecture}, {parameters}{without}"


def _configuration(
    pretrained: Pretrained, seq_len: int | None, content: bytes | None, end_of_document: str | None
) -> DictConfig:
    """Return the configuration of a run that starts from the folder, whose data is a tokenizer alone."""
    config = compose_run([])
    config.init_from = str(pretrained.folder)
    inherit_model(config, [])
    if "moe" in pretrained.model:
        config.model.moe.load_balancing_weight = pretrained.model["moe"]["load_balancing_weight"]
    length = seq_len or pretrained.max_length or LENGTH
    tokenizer = None if content is None else make_tokenizer(content, str(pretrained.folder), end_of_document)
    config.data = {
        "_target_": IMPORTED,
        "path": str(pretrained.folder),
        "end_of_document": None if tokenizer is None else tokenizer.end_of_document,
        "vocab_size": pretrained.model["vocab_size"],
        "seq_len": length,
        "batch_size": max(1, min(8, BATCH_TOKENS // length)),
    }
    return config


def _write(folder: Path, config: DictConfig, weights: dict[str, Tensor], module: Any) -> None:
    """Write what train.py leaves of a run, at step 0."""
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    OmegaConf.save(OmegaConf.create([f"init_from={config.init_from}"]), folder / OVERRIDES)
    status = {"status": DONE, "step": 0, "reason": f"imported from {config.init_from}"}
    (folder / STATUS).write_text(json.dumps(status, indent=2) + "\n")
    checkpoint = {
        "state_dict": weights,
        "hyper_parameters": dict(module.hparams),
        "global_step": 0,
        "epoch": 0,
        "pytorch-lightning_version": L.__version__,
    }
    save(checkpoint, folder / LAST)
