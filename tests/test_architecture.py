"""What the tree promises: who may import whom, and that package files export names and do nothing else."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for path in ROOT.glob("**/*.py")
    if not any(
        part.startswith(".") or part in ("build", "data", "runs", "sweeps") for part in path.relative_to(ROOT).parts
    )
)
PROJECT = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in SOURCES}

# Of the project, a module may import its own package and what stands here; the longest matching prefix counts.
MAY_IMPORT = {
    "spannorm": set[str](),  # the library is installed without the rest
    "core": {"lightning_modules.config"},
    "datamodules": {"core"},
    "callbacks": {"core", "analysis"},  # which measures and predicts what monitors watch, in any model of blocks
    "lightning_modules.config": {"core"},
    "lightning_modules.argument_errors": {"core", "spannorm"},
    "lightning_modules.layers": {"core", "spannorm", "lightning_modules.config", "lightning_modules.argument_errors"},
    "lightning_modules.transformer": {
        "core",
        "spannorm",
        "lightning_modules.argument_errors",
        "lightning_modules.config",
        "lightning_modules.cross_entropy",
        "lightning_modules.layers",
    },
    "lightning_modules": {"core", "spannorm"},
}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


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
        assert not within(imported, "lightning_modules.language_module"), "nothing builds on the top"


@pytest.mark.parametrize("path", [path for path in SOURCES if within(module_name(path), "spannorm")], ids=module_name)
def test_the_library_needs_torch_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        assert {module.partition(".")[0] for module in modules} <= {"spannorm", "torch", *sys.stdlib_module_names}


def test_the_typed_configuration_costs_no_torch() -> None:
    code = "import sys, core.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_package_files_only_export_names() -> None:
    assert len(SOURCES) > 30
    for path in SOURCES:
        if path.name == "__init__.py":
            for node in ast.parse(path.read_text()).body:
                is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                is_list_of_names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
                assert is_docstring or is_list_of_names or isinstance(node, ast.ImportFrom), path
