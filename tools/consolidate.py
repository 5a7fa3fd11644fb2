"""The weights of a run as one safetensors file, whatever number of processes trained it.

    python -m tools.consolidate RUN                               # RUN/checkpoints/last.safetensors
    python -m tools.consolidate RUN --checkpoint best --output model.safetensors

Needs no process group and no GPU, but as much memory as the checkpoint. The file's metadata has the step and, as JSON,
what `LanguageModule(**hyper_parameters)` takes; the names are those of its `model`.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from core import cli
from core.atomic_write import write_whole
from core.checkpoint import load
from core.errors import UserError, one_line
from core.printable import printable
from core.untrusted import within

PREFIX = "model."


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
    write_whole(output, lambda unfinished: save_file(kept, unfinished, metadata={"format": "pt", **metadata}))
    return len(kept)


def main(arguments: argparse.Namespace) -> None:
    checkpoint = arguments.run / "checkpoints" / f"{arguments.checkpoint}.ckpt"
    beside = checkpoint.with_suffix(".safetensors")
    output = arguments.output or within(arguments.run, beside, f"--output {beside} writes there all the same")
    count = consolidate(checkpoint, output)
    print(f"{printable(output, limit=None)}: {count} tensors, {output.stat().st_size / 2**20:,.1f} MiB")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.consolidate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder, such as runs/moe_spannorm/TIME")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--output", type=Path, help="the file; default: beside the checkpoint")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(partial(main, parse_arguments()))
