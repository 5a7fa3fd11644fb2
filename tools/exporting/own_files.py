"""Puts a module, and whatever it imports of this project and of the user, into one flat folder by relative imports.

transformers loads the code of a model from such a folder. What a module imports of the library spannorm comes from one
file there (library_file.py). What is installed (torch, transformers, a package from PyPI) stays an import.
"""

import ast
import functools
import importlib.util
import re
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from core.errors import UserError
from tools.exporting import library_file
from tools.exporting.library_file import LIBRARY

ROOT = Path(__file__).resolve().parents[2]
ENCODING = re.compile(r"^([ \t\f]*#.*?coding[:=][ \t]*)[-\w.]+", re.ASCII)
"""A declaration of a source's encoding in one of its first two lines, as PEP 263 has it."""


class _Alias(NamedTuple):
    """One name that an import statement binds.

    Attributes:
        module: the module that it comes from, or that it is; LIBRARY for whatever is of the library.
        name: its name in that module; None: the module itself.
        bound: the name that it is bound to.
        needs: the library's modules that define it.
    """

    module: str
    name: str | None
    bound: str
    needs: tuple[str, ...] = ()


class _Statement(NamedTuple):
    """An import statement that has to be written anew.

    Attributes:
        node: where it stands.
        aliases: what it binds of what comes along.
        others: further statements that take its place.
    """

    node: ast.Import | ast.ImportFrom
    aliases: list[_Alias]
    others: list[str]


def collect(entry: str, replaced: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return {file name without .py: source} of a module and of all that it needs.

    Args:
        entry: dotted name of the module.
        replaced: {dotted name of a module: what is taken for its source}; all others are read.

    Raises:
        UserError: a source has an import that cannot be made relative; says which line, and what to write instead.
    """
    sources: dict[str, str] = {}
    needed: set[str] = set()
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        if module in sources or module == LIBRARY:
            continue
        sources[module] = (replaced or {}).get(module) or _read(module)
        aliases = [alias for statement in _imports(module, sources[module]) for alias in statement.aliases]
        needed.update(module for alias in aliases for module in alias.needs)
        waiting += sorted({alias.module for alias in aliases})
    names = {LIBRARY: LIBRARY}
    for module in sorted(sources, key=lambda module: (not module.startswith(f"{__package__}."), module)):  # ours first
        name = module.removeprefix(f"{__package__}.").replace(".", "_")
        while name in names.values():  # a.b and a_b
            name += "_"
        names[module] = name
    files = {names[module]: _relative(module, text, names) for module, text in sources.items()}
    return {**files, LIBRARY: library_file.join(needed)} if needed else files


def comes_along(module: str) -> bool:
    """Return whether a module is a file of this project or of the user, rather than installed or Python's own."""
    return _file(module) is not None


def _file(module: str) -> Path | None:
    """Return a module's source where it is to come along."""
    below = ROOT / module.replace(".", "/")
    for path in (below.with_suffix(".py"), below / "__init__.py"):
        if path.is_file():
            return path
    top = module.partition(".")[0]
    if _is_installed(top):  # asked first: to look for a submodule imports the packages that it is in
        return None
    return _origin(module)


@functools.cache
def _is_installed(top: str) -> bool:
    """Return whether a module that is in no package is Python's own, or lies where packages are installed."""
    path = _origin(top)
    if path is None:
        return True
    folder = path.parent.parent if path.name == "__init__.py" else path.parent
    standard = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
    return folder in standard or folder.name in ("site-packages", "dist-packages") or any(folder.glob("*.dist-info"))


def _origin(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin).resolve()


def _read(module: str) -> str:
    """Return a module's source, which is written as UTF-8 and so must not declare another encoding."""
    path = _file(module)
    assert path is not None, module
    with tokenize.open(path) as file:  # in the encoding that the file declares
        first, second, *others = f"{file.read()}\n".split("\n", 2)
    declared = (ENCODING.sub(r"\1utf-8", line) for line in (first, second))
    return "\n".join([*declared, *others]).removesuffix("\n")


def _imports(module: str, source: str) -> Iterator[_Statement]:
    """Yield each import statement that binds something of what comes along."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            origin = _absolute(module, node)
            if _is_of_library(origin):
                if not all(_is_in_library(origin, alias.name) for alias in node.names):
                    raise _refusal(module, node, source, f"from {LIBRARY} import NAME")
                yield _Statement(
                    node, [found for alias in node.names for found in _from_library(tree, origin, alias)], []
                )
            elif comes_along(origin):
                yield _Statement(node, [_from(origin, alias) for alias in node.names], [])
        elif isinstance(node, ast.Import) and any(_is_of_library(a.name) or comes_along(a.name) for a in node.names):
            statement = _Statement(node, [], [])
            for alias in node.names:
                bound = alias.asname or alias.name
                if not _is_of_library(alias.name) and not comes_along(alias.name):
                    statement.others.append(f"import {ast.unparse(alias)}")
                elif "." in bound:  # it binds the package, which there is none of in a flat folder
                    package, _, last = alias.name.rpartition(".")
                    raise _refusal(module, node, source, f"from {package} import {last}")
                elif alias.name == LIBRARY:
                    defined, used = library_file.public_names(), _attributes(tree, bound)
                    if not used <= defined.keys():
                        raise _refusal(module, node, source, f"from {LIBRARY} import NAME")
                    statement.aliases.append(_Alias(LIBRARY, None, bound, tuple(defined[name] for name in used)))
                elif _is_of_library(alias.name):
                    statement.aliases.append(_Alias(LIBRARY, None, bound, (alias.name,)))
                else:
                    statement.aliases.append(_Alias(alias.name, None, bound))
            yield statement


def _is_of_library(module: str) -> bool:
    return module == LIBRARY or module.startswith(f"{LIBRARY}.")


def _attributes(tree: ast.Module, name: str) -> set[str]:
    """Return the attributes that are read of a name; the name itself where it is used in another way."""
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    uses = [parents[node] for node in parents if isinstance(node, ast.Name) and node.id == name]
    return {use.attr if isinstance(use, ast.Attribute) else name for use in uses}


def _from(origin: str, alias: ast.alias) -> _Alias:
    bound = alias.asname or alias.name
    if comes_along(f"{origin}.{alias.name}"):
        return _Alias(f"{origin}.{alias.name}", None, bound)
    return _Alias(origin, alias.name, bound)


def _is_in_library(origin: str, name: str) -> bool:
    """Return whether one file that joins modules of the library can give what `from origin import name` does."""
    if origin == LIBRARY and (name == "*" or name in library_file.public_names()):
        return True
    return library_file.is_module(origin) or library_file.is_module(f"{origin}.{name}")


def _from_library(tree: ast.Module, origin: str, alias: ast.alias) -> list[_Alias]:
    defined, name, bound = library_file.public_names(), alias.name, alias.asname or alias.name
    if library_file.is_module(f"{origin}.{name}"):
        return [_Alias(LIBRARY, None, bound, (f"{origin}.{name}",))]
    if origin != LIBRARY:
        return [_Alias(LIBRARY, name, bound, (origin,))]
    if name != "*":
        return [_Alias(LIBRARY, name, bound, (defined[name],))]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return [_Alias(LIBRARY, each, each, (defined[each],)) for each in sorted(used & defined.keys())]


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    path = _file(module)
    package = module if path is not None and path.name == "__init__.py" else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return ".".join(part for part in (package, node.module) if part)


def _relative(module: str, source: str, names: dict[str, str]) -> str:
    """Return a module's source with relative imports of what comes along."""
    lines = source.split("\n")  # as ast counts them: splitlines ends a line at a form feed, too
    statements = sorted(_imports(module, source), key=lambda found: (found.node.lineno, found.node.col_offset))
    for node, aliases, others in reversed(statements):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        # ast counts bytes
        first, last = lines[node.lineno - 1].encode(), lines[node.end_lineno - 1].encode()
        before, after = first[: node.col_offset].decode(), last[node.end_col_offset :].decode()
        separator = "; " if before.strip() else f"\n{before}"
        text = separator.join([*_statements(aliases, names), *others])
        lines[node.lineno - 1 : node.end_lineno] = [before + text + after]
    return "\n".join(lines)


def _statements(aliases: list[_Alias], names: dict[str, str]) -> Iterator[str]:
    by_module: dict[str, list[str]] = {}
    for alias in aliases:
        if alias.name is None:
            flat = names[alias.module]
            yield f"from . import {flat}" + ("" if flat == alias.bound else f" as {alias.bound}")
        else:
            bound = alias.name if alias.name == alias.bound else f"{alias.name} as {alias.bound}"
            by_module.setdefault(alias.module, []).append(bound)
    yield from (f"from .{names[module]} import {', '.join(bound)}" for module, bound in by_module.items())


def _refusal(module: str, node: ast.stmt, source: str, instead: str) -> UserError:
    written = ast.get_source_segment(source, node)
    return UserError(f"{_file(module)}, line {node.lineno}: `{written}` cannot be exported; write `{instead}`")
