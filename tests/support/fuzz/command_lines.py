"""Command lines of every program, generated from what each takes: the composed configuration, or a dataclass."""

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from hypothesis import strategies as st
from omegaconf import OmegaConf

from datamodules.preparation.prepare import PrepareConfig
from lightning_modules.composing import register_schemas
from tests.support.runs import ROOT
from tools.evaluate import EvaluateConfig
from tools.export import ExportConfig
from tools.generate import GenerateConfig

SCALARS = ("0", "-1", "1", "2", "1.5", "1e400", "nan", "-inf", "true", "null", "abc", "''", "' '", "1_000", "0x10", "²")
LARGE = ("10000000", "1000000000", "1000000000000000000", "99999999999999999999", "-9223372036854775809")
COLLECTIONS = (
    "[]",
    "[0]",
    "[1,2]",
    "[0.9]",
    "[null]",
    "[[]]",
    "{}",
    "{a: 1}",
    "{0: 1}",
    "[{a: b}]",
    "{_target_: os.system}",
)
TEXTS = (
    "a" * 300,
    "../../beside/x",
    "'\\x1b[31m'",
    "'[/x]'",
    "é",
    "'a b'",
    "'a\\nb'",
    "${seed}",
    "${nothing}",
    "${",
    "${oc.env:COLUMNS}",
)
BROKEN = ("", "=", "[1", "{a", "'", "a=b", "a,b", ":", "#")
VALUES = (*SCALARS, *LARGE, *COLLECTIONS, *TEXTS, *BROKEN)
KINDS = ("0", "x", "[]", "[0.9]", "null", "{}", "{a: 1}", "", "true", "1e3")
"""What a group can be set to that is none: a scalar, a list, nothing, a mapping."""
SLOW = {
    "trainer.max_steps": LARGE[:2],
    "trainer.accumulate_grad_batches": LARGE[:1],
    "trainer.devices": ("2", "10000000"),
    "trainer.num_nodes": ("2",),
    "model.compile": ("true",),
}
"""Values that are right, and cost more than a test has."""


@cache
def composed() -> Any:
    """The configuration of train.py with every group's usual choice."""
    register_schemas()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return OmegaConf.to_container(compose("train", ["logger=[tensorboard,csv]"]), resolve=False)


def _walk(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if name:
        yield name, node
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _walk(value, f"{name}.{key}" if name else str(key))


@cache
def groups() -> tuple[str, ...]:
    """Dotted names of all that holds fields."""
    return (*(name for name, node in _walk(composed()) if isinstance(node, dict)), "experiment")


@cache
def fields() -> tuple[str, ...]:
    """Dotted names of all that holds a value, `_target_` aside: that names code, which is the user's to choose."""
    found = (name for name, node in _walk(composed()) if not isinstance(node, dict))
    return tuple(name for name in found if not name.endswith("_target_"))


def _is_cheap(field: str, value: str) -> bool:
    return value not in SLOW.get(field, ())


def field_overrides() -> st.SearchStrategy[tuple[str, ...]]:
    """One to three fields, each set to something."""
    pairs = st.tuples(st.sampled_from(fields()), st.sampled_from(VALUES)).filter(lambda pair: _is_cheap(*pair))
    one = pairs.map("=".join)
    odd = st.tuples(st.sampled_from(("+", "++", "~", "", "@")), one).map("".join)
    return st.lists(st.one_of(one, one, one, odd), min_size=1, max_size=3).map(tuple)


def group_overrides() -> st.SearchStrategy[tuple[str, ...]]:
    """One group, set to what is none."""
    return st.tuples(st.sampled_from(groups()), st.sampled_from(KINDS)).map(lambda pair: ("=".join(pair),))


def all_group_overrides() -> list[tuple[str, str]]:
    """Every group with every kind."""
    return [(group, kind) for group in groups() for kind in KINDS]


DATACLASSES: dict[str, Any] = {
    "tools.generate": GenerateConfig,
    "tools.evaluate": EvaluateConfig,
    "tools.export": ExportConfig,
    "tools.prepare": PrepareConfig,
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "tools.compare": ("tags", "output"),
    "tools.consolidate": ("checkpoint", "output"),
    "tools.plan": ("mfu", "peak_flops", "assumed_vocab_size", "device_gb"),
    "tools.replay": ("step", "allow"),
    "tools.runs": ("status", "sort"),
    "tools.propagation": ("output", "all_rows"),
    "studies.report": ("output",),
}
STUDY_FIELDS = ("study", "scale", "seeds", "runs_dir", "results_dir", "threads", "run", "hydra/launcher")
PLACES = ("run", "nothing", "", "beside", "../beside", "a" * 300, ".", "/dev/zero", "notes.txt", "[/x]", "\udcff", "-x")


def tool_command_lines() -> st.SearchStrategy[tuple[str, tuple[str, ...]]]:
    """(module, arguments)."""
    return st.one_of(
        *(_of_dataclass(module, schema) for module, schema in DATACLASSES.items()),
        *(_of_options(module, names) for module, names in OPTIONS.items()),
        *(_of_study(module) for module in ("studies.run", "studies.status")),
    )


def _of_dataclass(module: str, schema: Any) -> st.SearchStrategy[tuple[str, tuple[str, ...]]]:
    names = [*(field.name for field in dataclasses.fields(schema)), "nonsense", ""]
    settings = st.lists(
        st.tuples(st.sampled_from(names), st.sampled_from(VALUES)).map("=".join), min_size=1, max_size=3
    )
    if module == "tools.prepare":
        valid = st.sampled_from(
            ([], ["input=texts"], ["input=texts", "output=corpus"], ["inspect"], ["inspect", "texts"])
        )
        return st.tuples(valid, settings).map(lambda parts: (module, (*parts[0], *parts[1])))
    return st.tuples(st.sampled_from(PLACES), settings).map(lambda parts: (module, (parts[0], *parts[1])))


def _of_options(module: str, names: tuple[str, ...]) -> st.SearchStrategy[tuple[str, tuple[str, ...]]]:
    if module in ("tools.plan", "tools.propagation"):
        first = st.one_of(field_overrides(), group_overrides())
    else:
        first = st.lists(st.sampled_from(PLACES), min_size=1, max_size=2).map(tuple)
    pairs = st.tuples(st.sampled_from((*names, "nonsense")), st.sampled_from(VALUES))
    option = st.one_of(pairs.map("=".join), pairs.map("=".join), pairs.map(lambda pair: f"--{'='.join(pair)}"))
    options = st.lists(option, max_size=2).map(tuple)
    return st.tuples(first, options).map(lambda parts: (module, (*parts[0], *parts[1])))


def _of_study(module: str) -> st.SearchStrategy[tuple[str, tuple[str, ...]]]:
    pairs = st.tuples(st.sampled_from(STUDY_FIELDS), st.sampled_from((*VALUES, "depth", "laptop"))).map("=".join)
    return st.tuples(st.sampled_from(((), ("study=depth",))), st.lists(pairs, min_size=1, max_size=2)).map(
        lambda parts: (module, (*parts[0], *parts[1]))
    )
