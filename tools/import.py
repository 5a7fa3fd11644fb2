"""Make a run of a folder of Hugging Face transformers, which the other tools open; nothing is trained.

    python -m tools.import FOLDER output=runs/llama
    python -m tools.import FOLDER output=runs/llama seq_len=2048

FOLDER has config.json, model.safetensors (or several, with an index) and tokenizer.json: a Llama, Mistral, Qwen2,
Qwen3, OLMo 2, Mixtral, OLMoE or Qwen3-MoE; what of another one would be lost is refused by its name. The tools
generate, export and evaluate (data=CORPUS) then take runs/llama, and train.py, tools.plan and tools.propagation start
from it by init_from=runs/llama. transformers is not needed.
"""

from dataclasses import dataclass, field
from pathlib import Path

from core import cli
from core.dataclass_cli import FIRST
from core.errors import require
from core.printable import printable


@dataclass(frozen=True)
class ImportConfig:
    """Holds the fields that `python -m tools.import` takes.

    Attributes:
        folder: the folder of transformers.
        output: the run folder to make.
        seq_len: tokens that the model reads at once; null: as many as in its training (max_position_embeddings).
        end_of_document: the token that ends a text; null: the folder's eos_token.
    """

    folder: Path = field(metadata=FIRST)
    output: Path
    seq_len: int | None = None
    end_of_document: str | None = None

    def __post_init__(self) -> None:
        require(self.seq_len is None or self.seq_len >= 1, "seq_len", self.seq_len, "an integer >= 1 or null")


@cli.tool
def main(config: ImportConfig) -> None:
    from tools.importing import make_run

    made = make_run(config.folder, config.output, config.seq_len, config.end_of_document)
    print(printable(made, limit=None))


if __name__ == "__main__":
    cli.run(main)
