"""Take trained models apart: what each block does, what the head says at every depth, how like each other depths are.

    python -m tools.anatomy RUN                                             writes RUN/anatomy/report/report.md
    python -m tools.anatomy RUN1 RUN2 RUN3 output=runs/anatomy              side by side, on the same text
    python -m tools.anatomy RUN measures=layer_drop,tuned_lens tokens=65536
    python -m tools.anatomy RUN data=data/texts                             of an imported model, say

Writes report.md with its pictures, report.json, and a log for TensorBoard into a new folder, and nothing else.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core import cli
from core.dataclass_cli import FIRST
from core.errors import require
from core.printable import printable
from tools.run_labels import labels

OUTPUT = Path("runs/anatomy")


@dataclass(frozen=True)
class AnatomyConfig:
    """Holds the fields that `python -m tools.anatomy` takes.

    Attributes:
        runs: run folders, such as runs/dense_prenorm/TIME; the others are compared with the first.
        measures: what is measured; none: all that are not slow. docs/anatomy.md lists them.
        tokens: measure on so many tokens of held-out text, in whole sequences.
        data: the folder of a prepared corpus, whose validation split is the text; null: the first run's own.
        batch_size: take so many sequences at once; null: as many as the first run was trained on.
        skip: leave a block out by its placement's equation with sublayers that put out zeros, or by passing over it.
        checkpoint: the one to take: last, best, or a path.
        output: the folder of the report, which is made; null: RUN/anatomy/report, or runs/anatomy of several.
        allow: what the runs' configurations name, and you vouch for: classes of yours, as my_file.Mine, and addresses.
    """

    runs: tuple[Path, ...] = field(metadata=FIRST)
    measures: tuple[str, ...] = ()
    tokens: int = 16384
    data: str | None = None
    batch_size: int | None = None
    skip: Literal["placement", "identity"] = "placement"
    checkpoint: str = "last"
    output: Path | None = None
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", self.tokens, "an integer >= 1")
        valid = "an integer >= 1"
        require(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, valid)
        labels(self.runs)  # which refuses a run that is given twice


@cli.tool
def main(config: AnatomyConfig) -> None:
    from core.console import silence_noise
    from core.untrusted import within
    from tools.examination.examine import Chosen, by_default, examine
    from tools.examination.report import Report, write
    from tools.examination.steps import kept_of

    silence_noise()
    several = len(config.runs) > 1
    measures = by_default(config.measures, several)
    output = config.output
    if output is None:
        output = OUTPUT if several else within(config.runs[0], config.runs[0] / "anatomy/report", "give output=FOLDER")
    require(not output.exists(), "output", str(output), "a new folder: this one is there already")
    kept = [kept_of(folder) for folder in config.runs]
    chosen = Chosen(
        config.runs,
        measures,
        config.tokens,
        config.data,
        config.batch_size,
        config.checkpoint,
        config.skip,
        config.allow,
    )
    text, examined = examine(chosen)
    source = f"the validation split of {config.data or config.runs[0]}"
    path = write(Report(text, examined, source, kept), output)
    print(f"Report: {printable(path, limit=None)}")


if __name__ == "__main__":
    cli.run(main)
