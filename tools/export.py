"""Write a trained model as a folder that Hugging Face transformers loads: safetensors, configuration, tokenizer.

    python -m tools.export RUN output=exported/mine
    python -m tools.export RUN output=exported/mine checkpoint=best dtype=bfloat16

PreNorm with RMSNorm becomes a Llama, or a Mixtral where every FFN is a mixture; with biases on q, k and v, or norms on
q and k, it may be a Qwen or OLMoE, and outputnorm is OLMo 2. Whatever none of them can represent is written with its
own code, a modeling file and the part of the library spannorm that it needs, and loaded by
AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True). What was done, and why, is printed.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core import cli
from core.dataclass_cli import FIRST
from core.errors import UserError, require, writing
from core.printable import printable


@dataclass(frozen=True)
class ExportConfig:
    """Holds the fields that `python -m tools.export` takes.

    Attributes:
        run: a run folder, such as runs/moe_spannorm/TIME.
        output: the folder to make.
        checkpoint: the one to take: last, best, or a path.
        dtype: the type that the weights are written in.
        allow: what the run's configuration names, and you vouch for: classes of yours, as my_file.Mine, and addresses.
    """

    run: Path = field(metadata=FIRST)
    output: Path
    checkpoint: str = "last"
    dtype: Literal["float32", "bfloat16"] = "float32"
    allow: tuple[str, ...] = ()


def export(config: ExportConfig) -> str:
    """Write the folder; says in a line what it holds. An export that fails leaves nothing behind.

    Raises:
        ConfigError: no run, or a folder that is there already or cannot be made.
        UserError: transformers is not installed.
    """
    try:
        from transformers.utils import logging
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -r requirements-eval.txt") from error
    import torch

    from core.open_run import open_run
    from lightning_modules.transformer import Transformer
    from lightning_modules.vision_transformer import VisionTransformer

    writers = {Transformer: _write_language, VisionTransformer: _write_images}
    output = config.output
    require(not output.exists(), "output", str(output), "a new folder: this one is there already")
    run = open_run(config.run, config.checkpoint, config.allow)
    run.module.model.cpu()
    write = next((writers[kind] for kind in type(run.module.model).__mro__ if kind in writers), None)
    valid = "a run that predicts the next token, or classifies images: transformers has no other model of its kind"
    fits = write is not None and (write is not _write_language or run.module.task.predicts_next)
    require(fits, "RUN", str(config.run), valid)
    assert write is not None
    logging.disable_progress_bar()
    with writing("output", output):
        output.mkdir(parents=True)
        try:
            return f"{output}: {write(run, output, getattr(torch, config.dtype))}"
        except BaseException:
            shutil.rmtree(output)
            raise


def _write_language(run: Any, output: Path, dtype: Any) -> str:
    """Write what loads as AutoModelForCausalLM; says in words what that is."""
    from datamodules.tokenizers import NumberTokenizer
    from lightning_modules.pretrained.families import FAMILIES
    from tools.exporting import native, remote_code, tokenizer

    model, data = run.module.model, run.datamodule
    end = None if isinstance(data.tokenizer, NumberTokenizer) else data.tokenizer.end_of_document
    theirs = tokenizer.to_hugging_face(data.tokenizer, data.seq_len)
    family = native.find_family(model)
    if not isinstance(family, str):
        native.write(model, family, output, data.seq_len, end, dtype)
        what = family.architecture
    else:
        remote_code.write(model, output, data.seq_len, end, dtype)
        known = ", ".join(known.architecture.removesuffix("ForCausalLM") for known in FAMILIES.values())
        what = f"PlacementForCausalLM, by its own code (trust_remote_code=True): {family} is in none of {known}"
    if theirs is not None:
        theirs.save_pretrained(output)
        _name_as_both_do(output / "tokenizer_config.json")
    return f"{what}, step {run.step}{'' if theirs else '; no tokenizer, as the data is no text'}"


def _write_images(run: Any, output: Path, dtype: Any) -> str:
    """Write what loads as AutoModelForImageClassification; says in words what that is."""
    from tools.exporting import images

    images.write(run.module.model, output, run.datamodule, run.data_identity, dtype)
    named = "" if getattr(run.datamodule, "classes", None) else "; classes have no names, and are numbers"
    return f"PlacementForImageClassification, by its own code (trust_remote_code=True), step {run.step}{named}"


def _name_as_both_do(path: Path) -> None:
    """Give a tokenizer the name, and the outputs, that transformers 4 and 5 agree on."""
    written = json.loads(path.read_text())
    written["tokenizer_class"] = "PreTrainedTokenizerFast"
    written["model_input_names"] = ["input_ids", "attention_mask"]  # 4 would add token_type_ids, which generate refuses
    path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")


@cli.tool
def main(config: ExportConfig) -> None:
    print(printable(export(config), limit=None))


if __name__ == "__main__":
    cli.run(main)
