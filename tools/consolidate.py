"""The weights of a run as one safetensors file, whatever number of processes trained it.

    python -m tools.consolidate RUN                               # RUN/checkpoints/last.safetensors
    python -m tools.consolidate RUN checkpoint=best output=model.safetensors

Needs no process group and no GPU, but as much memory as the checkpoint. The file's metadata has the step and, as JSON,
what `LanguageModule(**hyper_parameters)` takes; the names are those of its `model`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from core import cli
from core.atomic_write import save_tensors, write_whole
from core.checkpoint import load
from core.dataclass_cli import FIRST
from core.errors import UserError, one_line, require
from core.printable import printable
from core.untrusted import within

PREFIX = "model."
ENDING = ".safetensors"


@dataclass(frozen=True)
class ConsolidateConfig:
    """Holds the fields that `python -m tools.consolidate` takes.

    Attributes:
        run: a run folder, such as runs/moe_spannorm/TIME.
        checkpoint: the one whose weights are written.
        output: the file that is written, NAME.safetensors; null: beside the checkpoint.
    """

    run: Path = field(metadata=FIRST)
    checkpoint: Literal["last", "best"] = "last"
    output: Path | None = None

    def __post_init__(self) -> None:
        # What is there under the name is replaced: by another ending it could be the run's checkpoint.
        fits = self.output is None or (self.output.suffix == ENDING and not self.output.is_dir())
        require(fits, "output", str(self.output), f"the name of a file that ends in {ENDING}")


def consolidate(checkpoint: Path, output: Path) -> int:
    """Write the weights of a checkpoint, file or folder, into one file, whole or not at all.

    Returns:
        The number of tensors.

    Raises:
        UserError: there is no checkpoint, or it cannot be read as one of this project.
    """
    try:
        content = load(checkpoint)
        weights: dict[str, Tensor] = content["state_dict"]
        metadata = {"step": str(content["global_step"]), "hyper_parameters": json.dumps(content["hyper_parameters"])}
        tied = content["hyper_parameters"]["model"].get("tie_embeddings")
    except Exception as error:  # truncated, not there, no checkpoint at all, or one with code in it
        raise UserError(f"{checkpoint} cannot be read as a checkpoint of this project ({one_line(error)})") from error
    kept = {n.removeprefix(PREFIX): tensor.contiguous() for n, tensor in weights.items() if n.startswith(PREFIX)}
    if tied:
        kept.pop("head.weight", None)  # is the embedding's
    write_whole(output, lambda unfinished: save_tensors(kept, unfinished, {"format": "pt", **metadata}))
    return len(kept)


@cli.tool
def main(config: ConsolidateConfig) -> None:
    checkpoint = config.run / "checkpoints" / f"{config.checkpoint}.ckpt"
    beside = checkpoint.with_suffix(ENDING)
    output = config.output or within(config.run, beside, f"output={beside} writes there all the same")
    count = consolidate(checkpoint, output)
    print(f"{printable(output, limit=None)}: {count} tensors, {output.stat().st_size / 2**20:,.1f} MiB")


if __name__ == "__main__":
    cli.run(main)
