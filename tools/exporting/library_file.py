"""Joins files of the library spannorm into one, which an exported model brings along."""

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import spannorm

LIBRARY = "spannorm"
DOCSTRING = '''"""Where a block normalizes, and what its norms are: what this model needs of the library spannorm.

Each part is one file of the library, unchanged but for its imports.
"""
'''


def is_module(name: str) -> bool:
    """Return whether the library has a module (no package) of this dotted name."""
    return name.partition(".")[0] == LIBRARY and _path(name).is_file()


@cache
def public_names() -> dict[str, str]:
    """Return the module that defines each name which the library exports."""
    found: dict[str, str] = {}
    for node in ast.parse((_root() / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.name: node.module for alias in node.names}
    return found


def join(modules: Iterable[str]) -> str:
    """Return one source with these modules and all that they import of the library, each after what it imports."""
    order: list[str] = []
    for module in sorted(modules):
        _visit(module, order)
    plain, froms = set[str](), dict[str, set[str]]()
    parts = []
    for module in order:
        source = _path(module).read_text("utf-8")
        tree = ast.parse(source)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in imports:
            if isinstance(node, ast.Import):
                plain |= {ast.unparse(alias) for alias in node.names}
            elif not _is_of_library(node):
                froms.setdefault(str(node.module), set()).update(ast.unparse(alias) for alias in node.names)
        parts.append(_as_part(module, source, [tree.body[0], *imports]))
    return "\n\n".join([f"{DOCSTRING}\n{_import_block(plain, froms)}".rstrip("\n"), *parts])


def sort_names(names: Iterable[str]) -> list[str]:
    """Return imported names in isort's order: constants, then classes, then functions."""

    def rank(name: str) -> tuple[int, str]:
        return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name

    return sorted(names, key=rank)


def _root() -> Path:
    return Path(spannorm.__file__).parent


def _path(module: str) -> Path:
    return _root().parent / f"{module.replace('.', '/')}.py"


def _is_of_library(node: ast.Import | ast.ImportFrom) -> bool:
    return isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == LIBRARY


def _visit(module: str, order: list[str]) -> None:
    """Append a module behind those that it imports."""
    if module in order:
        return
    for node in ast.parse(_path(module).read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and _is_of_library(node):
            _visit(str(node.module), order)
    order.append(module)


def _as_part(module: str, source: str, removed: list[ast.stmt]) -> str:
    """Return a module's source without its docstring, which becomes a comment, and without its imports."""
    lines: list[str | None] = list(source.splitlines())
    for node in removed:
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    text = "\n".join(line for line in lines if line is not None).strip()
    docstring = ast.get_docstring(ast.parse(source)) or ""
    heading = "\n".join(f"# {line}".rstrip() for line in docstring.splitlines())
    title = f"# {module.replace('.', '/')}.py "
    return f"{title.ljust(120, '-')}\n{heading}\n\n\n{text}\n"


def _import_block(plain: set[str], froms: dict[str, set[str]]) -> str:
    """Return the imports in the order that ruff and isort give them: the standard library's, then torch's."""
    block = []
    for is_torch in (False, True):
        names = sorted(name for name in plain if name.startswith("torch") == is_torch)
        block += [f"import {name}" for name in names]
        for module in sorted(module for module in froms if module.startswith("torch") == is_torch):
            block.append(f"from {module} import {', '.join(sort_names(froms[module]))}")
        block.append("")
    return "\n".join(block)
