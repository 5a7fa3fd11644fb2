"""Take trained models apart: what each block does, what the head says at every depth, how like each other depths are.

    python -m tools.anatomy RUN                                             writes RUN/anatomy/report/report.md
    python -m tools.anatomy RUN1 RUN2 RUN3 output=runs/anatomy              side by side, on the same data
    python -m tools.anatomy RUN measures=layer_drop,tuned_lens tokens=65536
    python -m tools.anatomy RUN data=data/texts                             of an imported model, say
    python -m tools.anatomy RUN checkpoint=RUN/checkpoints/previous.ckpt,last    two checkpoints of one run

Writes report.md with its pictures, report.json, and a log for TensorBoard into a new folder, and nothing else.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core import cli
from core.checkpoint_path import NAMED, checkpoint_path
from core.dataclass_cli import FIRST
from core.errors import require
from core.paths import require_new_folder
from core.printable import printable
from tools.run_labels import labels

OUTPUT = Path("runs/anatomy")


@dataclass(frozen=True)
class AnatomyConfig:
    """Holds the fields that `python -m tools.anatomy` takes.

    Attributes:
        runs: run folders, such as runs/dense_prenorm/TIME; the others are compared with the first.
        measures: what is measured; none: all that are not slow. docs/anatomy.md lists them.
        tokens: measure on so many tokens of held-out text, in whole sequences; of images, on so many patches and class
            tokens of whole ones.
        data: the folder of a prepared corpus, whose validation split is the text; null: the first run's own. Of images
            there are no others.
        batch_size: take so many sequences or images at once; null: as many as the first run was trained on.
        skip: leave a block out by its placement's equation with sublayers that put out zeros, or by passing over it.
        checkpoint: take this one of each run: last, best, or a path; or as many as there are runs, in their order. Of a
            single run several stand side by side as several runs do.
        output: the folder of the report, which is made; null: RUN/anatomy/report, or runs/anatomy of several.
        allow: what the runs' configurations name, and you vouch for: classes of yours, as my_file.Mine, and addresses.
    """

    runs: tuple[Path, ...] = field(metadata=FIRST)
    measures: tuple[str, ...] = ()
    tokens: int = 16384
    data: str | None = None
    batch_size: int | None = None
    skip: Literal["placement", "identity"] = "placement"
    checkpoint: tuple[str, ...] = ("last",)
    output: Path | None = None
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", self.tokens, "an integer >= 1")
        require(len(set(self.measures)) == len(self.measures), "measures", ",".join(self.measures), "each once")
        valid = "an integer >= 1"
        require(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, valid)
        given = len(self.checkpoint)
        fits = given == 1 or (given > 1 and len(self.runs) in (1, given))
        require(fits, "checkpoint", ",".join(self.checkpoint), "last, best or a path: one, or one for each run")
        valid = "last or best, where one is for several runs"
        path = len(self.runs) > given and self.checkpoint[0] not in NAMED
        require(not path, "checkpoint", self.checkpoint[0], valid)
        runs, checkpoints = self.measured()
        labels(runs, list(map(checkpoint_path, runs, checkpoints)))  # which refuses what is given twice

    def measured(self) -> tuple[tuple[Path, ...], tuple[str, ...]]:
        """Return what stands side by side: a folder and a checkpoint of each."""
        number = max(len(self.runs), len(self.checkpoint))
        runs = self.runs * number if len(self.runs) == 1 else self.runs
        return runs, self.checkpoint * number if len(self.checkpoint) == 1 else self.checkpoint


@cli.tool
def main(config: AnatomyConfig) -> None:
    from core.console import silence_noise
    from core.untrusted import within
    from tools.examination.examine import Chosen, by_default, examine
    from tools.examination.report import Report, write
    from tools.examination.steps import kept_of

    silence_noise()
    runs, checkpoints = config.measured()
    several = len(runs) > 1
    measures = by_default(config.measures, several)
    output = config.output
    if output is None:
        output = OUTPUT if several else within(runs[0], runs[0] / "anatomy/report", "give output=FOLDER")
    require_new_folder("output", output)
    kept = [kept_of(folder) if folder not in runs[:number] else [] for number, folder in enumerate(runs)]
    chosen = Chosen(
        runs, measures, config.tokens, config.data, config.batch_size, checkpoints, config.skip, config.allow
    )
    data, examined = examine(chosen)
    source = f"the validation split of {config.data or config.runs[0]}"
    path = write(Report(data, examined, source, kept), output)
    print(f"Report: {printable(path, limit=None)}")


if __name__ == "__main__":
    cli.run(main)
