"""Lists the tools with a line each, starts one, and lets a shell complete what they take.

    python -m tools                                        what there is
    python -m tools NAME ARGUMENTS                         the same as: python -m tools.NAME ARGUMENTS
    eval "$(python -m tools --shell-completion bash)"      TAB completes names, fields, and the choices that a field has

The sources are read, and nothing of them is imported: that would take seconds, of which a shell has none.
"""

import ast
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

from core.errors import UserError, require, suggest
from core.printable import printable

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tools", "studies", "benchmarks")
BASH = Path(__file__).with_name("completion.bash")


def programs() -> dict[str, ast.Module]:
    """Return the source of every module that `python -m` starts, by its name."""
    found = {}
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).glob("[!_]*.py"))):
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree.body):
            found[f"{path.parent.name}.{path.stem}"] = tree
    return found


def words(tree: ast.Module) -> Iterator[str]:
    """Yield what may stand on a program's command line: FIELD=, or FIELD=CHOICE for each choice that there is."""
    names = {
        node.args.args[0].annotation.id  # type: ignore[union-attr]
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and "cli.tool" in map(ast.unparse, node.decorator_list)
    }
    sources = [tree]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and names & {alias.name for alias in node.names}:  # another module's class
            sources.append(ast.parse((ROOT / f"{str(node.module).replace('.', '/')}.py").read_text()))
    for node in (node for source in sources for node in source.body):
        if isinstance(node, ast.ClassDef) and node.name in names:
            for field in (field for field in node.body if isinstance(field, ast.AnnAssign)):
                default = ast.unparse(field.value) if field.value else ""
                if "OVERRIDES" in default:
                    yield from _overrides("study" if "STUDY_OVERRIDES" in default else "train")
                elif "metadata=FIRST" not in default:
                    yield from _of_field(ast.unparse(field.target), field.annotation)


def _of_field(name: str, annotation: ast.expr) -> Iterator[str]:
    constants = (node.value for node in ast.walk(annotation) if isinstance(node, ast.Constant))
    choices = [value for value in constants if isinstance(value, str)]
    choices += ["true", "false"] if ast.unparse(annotation) == "bool" else []
    yield from (f"{name}={choice}" for choice in choices or [""])


def _overrides(config: str) -> Iterator[str]:
    """Yield the choices of the groups, and the single fields, of configs/train.yaml or configs/study.yaml."""
    text = (ROOT / f"configs/{config}.yaml").read_text()
    for group in re.findall(r"^  - (\w+): ", text, re.MULTILINE):
        yield from (f"{group}={path.stem}" for path in sorted((ROOT / "configs" / group).glob("*.yaml")))
    yield from (f"{field}=" for field in re.findall(r"^(\w+): ", text, re.MULTILINE))


def listing(found: dict[str, ast.Module]) -> str:
    """Return the first line of each program's docstring, under its package."""
    lines = []
    for package in PACKAGES:
        lines.append(f"python -m {package}.NAME:")
        for name, tree in found.items():
            if name.startswith(f"{package}."):
                docstring = ast.get_docstring(tree) or ""
                lines.append(f"  {name.partition('.')[2]:<18}{docstring.splitlines()[0]}")
    return "\n".join([*lines, "--help says what each takes; docs/tools.md, how it is written."])


def completion(found: dict[str, ast.Module]) -> str:
    """Return completion.bash, with what each program takes filled in."""
    cases = "\n".join(f'        {name}) echo "{" ".join(words(tree))}" ;;' for name, tree in found.items())
    return BASH.read_text().replace("@NAMES@", " ".join(found)).replace("        @CASES@", cases)


def main(arguments: list[str]) -> None:
    found = programs()
    if arguments in ([], ["-h"], ["--help"]):
        print(listing(found))
    elif arguments[0] == "--shell-completion":
        require(arguments[1:] == ["bash"], "--shell-completion", " ".join(arguments[1:]), "bash")
        print(completion(found))
    else:
        names = [name.removeprefix("tools.") for name in found if name.startswith("tools.")]
        require(arguments[0] in names, "NAME", arguments[0], suggest(arguments[0], names))
        sys.argv[:] = arguments
        runpy.run_module(f"tools.{arguments[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:  # not by core.cli, which a shell that is about to complete would have to wait for
        print(f"Error: {printable(error, limit=None)}", file=sys.stderr)
        raise SystemExit(2) from None
