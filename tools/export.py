"""Write a trained model as a folder that Hugging Face transformers loads: safetensors, configuration, tokenizer.

    python -m tools.export RUN output=exported/mine
    python -m tools.export RUN output=exported/mine checkpoint=best

PreNorm with RMSNorm becomes a Llama, or a Mixtral where every FFN is a mixture. Whatever they cannot represent is
written with its own code, a modeling file and the part of the library spannorm that it needs, and loaded by
AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True). What was done, and why, is printed.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from core import cli
from core.dataclass_cli import FIRST
from core.errors import UserError, require, writing


@dataclass(frozen=True)
class ExportConfig:
    """Holds the fields that `python -m tools.export` takes.

    Attributes:
        run: a run folder, such as runs/moe_spannorm/TIME.
        output: the folder to make.
        checkpoint: the one to take: last, best, or a path.
        allow: what the run's configuration names, and you vouch for: classes of yours, as my_file.Mine, and addresses.
    """

    run: Path = field(metadata=FIRST)
    output: Path
    checkpoint: str = "last"
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
    from core.open_run import open_run
    from datamodules.tokenizers import NumberTokenizer
    from tools.exporting import llama, remote_code, tokenizer

    output = config.output
    require(not output.exists(), "output", str(output), "a new folder: this one is there already")
    run = open_run(config.run, config.checkpoint, config.allow)
    model, data = run.module.model.cpu(), run.datamodule
    end = None if isinstance(data.tokenizer, NumberTokenizer) else data.tokenizer.end_of_document
    max_length = data.seq_len
    theirs = tokenizer.to_hugging_face(data.tokenizer, max_length)
    logging.disable_progress_bar()
    with writing("output", output):
        output.mkdir(parents=True)
        try:
            why = llama.obstacle(model)
            if why is None:
                converted = llama.to_hugging_face(model, max_length, end)
                llama.save(converted, output)
                what = type(converted).__name__
            else:
                remote_code.write(model, output, max_length, end)
                what = "PlacementForCausalLM, by its own code (trust_remote_code=True): "
                what += f"{why} is in neither Llama nor Mixtral"
            if theirs is not None:
                theirs.save_pretrained(output)
                _name_as_both_do(output / "tokenizer_config.json")
        except BaseException:
            shutil.rmtree(output)
            raise
    return f"{output}: {what}, step {run.step}{'' if theirs else '; no tokenizer, as the data is no text'}"


def _name_as_both_do(path: Path) -> None:
    """Give a tokenizer the name, and the outputs, that transformers 4 and 5 agree on."""
    written = json.loads(path.read_text())
    written["tokenizer_class"] = "PreTrainedTokenizerFast"
    written["model_input_names"] = ["input_ids", "attention_mask"]  # 4 would add token_type_ids, which generate refuses
    path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")


@cli.tool
def main(config: ExportConfig) -> None:
    print(export(config))


if __name__ == "__main__":
    cli.run(main)
