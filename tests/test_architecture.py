"""What the tree promises: who may import whom, and that package files export names and do nothing else."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.sources import ROOT, SOURCES, module_name

PROJECT = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in SOURCES}

GROUPS = ("monitors", "divergence", "checkpointing", "console")
SHARED = ("statistics", "scalars", "charts", "protocols")

OPEN_FRAGMENTS = {
    "At",
    "By",
    "For",
    "From",
    "How",
    "In",
    "Of",
    "On",
    "That",
    "What",
    "When",
    "Where",
    "Whether",
    "Which",
    "Who",
    "Whose",
    "Why",
    "With",
}

# Of the project, a module may import its own package and what stands here; the longest matching prefix counts.
MAY_IMPORT = {
    "spannorm": set[str](),  # the library is installed without the rest
    "core": set[str](),
    "datamodules": {"core"},
    "callbacks": {"core"},
    **{f"callbacks.{shared}": {"core"} for shared in SHARED},
    # No group knows another: what one asks of another stands in callbacks.protocols.
    **{f"callbacks.{group}": {"core", *(f"callbacks.{shared}" for shared in SHARED)} for group in GROUPS},
    # Which measures and predicts what monitors watch, in any model of blocks.
    "callbacks.monitors": {"core", "analysis", *(f"callbacks.{shared}" for shared in SHARED)},
    "callbacks.console": {"core", "datamodules.tokenizers", *(f"callbacks.{shared}" for shared in SHARED)},
    "lightning_modules.config": {"core"},
    # What init_from names says what the model is.
    "lightning_modules.composing": {"core", "lightning_modules.config", "lightning_modules.warm_start"},
    "lightning_modules.argument_errors": {"core", "spannorm"},
    "lightning_modules.layers": {"core", "spannorm", "lightning_modules.config", "lightning_modules.argument_errors"},
    # What all modalities share knows nothing of any.
    "lightning_modules.trunk": {
        "core",
        "spannorm",
        "lightning_modules.argument_errors",
        "lightning_modules.config",
        "lightning_modules.layers",
    },
    "lightning_modules.transformer": {
        "core",
        "spannorm",
        "lightning_modules.config",
        "lightning_modules.cross_entropy",
        "lightning_modules.layers",
        "lightning_modules.trunk",
    },
    "lightning_modules": {"core", "spannorm"},
}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def project_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] in PROJECT)


def rule_of(path: Path) -> str | None:
    return max((prefix for prefix in MAY_IMPORT if within(module_name(path), prefix)), key=len, default=None)


@pytest.mark.parametrize("path", [path for path in SOURCES if rule_of(path)], ids=module_name)
def test_imports_point_downwards(path: Path) -> None:
    package = rule_of(path)
    assert package is not None
    for imported in project_imports(path):
        assert any(within(imported, allowed) for allowed in {package} | MAY_IMPORT[package]), imported
        variation = module_name(path) == "lightning_modules.masked_language_module"
        assert variation or not within(imported, "lightning_modules.language_module"), "nothing builds on the top"


@pytest.mark.parametrize("path", [path for path in SOURCES if within(module_name(path), "spannorm")], ids=module_name)
def test_the_library_needs_torch_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        assert {module.partition(".")[0] for module in modules} <= {"spannorm", "torch", *sys.stdlib_module_names}


def imports_as_it_loads(path: Path) -> set[str]:
    """The project's modules that are imported before anything of the module is called."""
    known, found = {module_name(source) for source in SOURCES}, set()
    nodes: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [name for alias in node.names for name in (f"{node.module}.{alias.name}", str(node.module))]
        found |= known & set(names)
        nodes += ast.iter_child_nodes(node)
    return found - {module_name(path)}


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Of such a circle, what can be imported depends on who comes first."""
    graph = {module_name(path): imports_as_it_loads(path) for path in SOURCES if path.name != "__init__.py"}
    assert {"callbacks.statistics", "core.steps"} <= graph["callbacks.divergence.divergence"] | graph[
        "core.run_control"
    ]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_callback_is_found_by_its_class() -> None:
    """But by what it can do (callbacks.protocols), unless the class is a base that others derive from."""
    concrete = {
        node.name
        for path in ROOT.glob("callbacks/*/**/*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
        and any(base in ("L.Callback", "Checkpoint") for base in map(ast.unparse, node.bases))
    }
    assert {"LastCheckpoint", "FlightRecorder", "Throughput", "Divergence"} <= concrete
    for path in [*ROOT.glob("callbacks/**/*.py"), *ROOT.glob("core/*.py"), *ROOT.glob("lightning_modules/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                assert not asked & (concrete - {"BlockMonitor"}), f"{path}:{node.lineno}"


def test_what_needs_no_torch_does_not_wait_for_it() -> None:
    """The typed configuration, and commands that only read records, events and settings: torch takes seconds."""
    names = "core.cli", "studies.status", "tools.compare", "tools.curves", "tools.prepare", "tools.runs", "tools.watch"
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_package_files_only_export_names() -> None:
    assert len(SOURCES) > 30
    for path in SOURCES:
        if path.name == "__init__.py":
            for node in ast.parse(path.read_text()).body:
                is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                is_list_of_names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
                assert is_docstring or is_list_of_names or isinstance(node, ast.ImportFrom), path


def test_no_test_imports_another() -> None:
    """What two of them need is in tests/support."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = (
                [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            )
            assert not any(part.startswith(("test_", "conftest")) for name in imported for part in name.split(".")), (
                path
            )


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield text


def test_docstrings_are_sentences() -> None:
    """None opens with a word that makes a fragment of it, as in "Of the run" or "What it takes"."""
    sources = [path for path in SOURCES if not module_name(path).startswith("tests.")]
    opening = {(module_name(path), text.splitlines()[0]) for path in sources for text in _docstrings(path)}
    assert len(opening) > 1000, "the search finds nothing any more"
    assert not {(name, line) for name, line in opening if line.partition(" ")[0] in OPEN_FRAGMENTS}


def test_nothing_is_unpacked_where_it_could_stand() -> None:
    """As in `[*(1, 2), *(3, 4)]`, which saves lines and makes the reader count brackets."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            in_vain = isinstance(node, ast.Starred) and isinstance(node.value, ast.Tuple | ast.List)
            assert not in_vain, f"{path}, line {node.lineno}"
