"""The project's source files."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


SOURCES = sorted(
    path
    for path in ROOT.glob("**/*.py")
    if not any(
        part.startswith(".") or part in ("build", "data", "runs", "sweeps") for part in path.relative_to(ROOT).parts
    )
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
