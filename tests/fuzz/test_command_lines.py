"""Any command line of any program works, or is refused in one line that names what was set; see judge.py."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from tests.support.fuzz import command_lines
from tests.support.fuzz.judge import faults, names_one_of
from tests.support.fuzz.sandbox import Sandbox, tree
from tests.support.runs import tiny_job

TINY = tiny_job("trainer.max_steps=1")
LITTLE = {"tools.propagation": ("model.dim=32", "model.num_layers=2", "model.num_heads=2", "data.seq_len=32")}
"""By module, what makes its usual work little; what is drawn comes behind it, and counts."""
GROUPS = command_lines.all_group_overrides()


def sample(max_examples: int) -> settings:
    """The same ones each time; nothing is shrunk, as each is short."""
    return settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def check(sandbox: Sandbox, program: str, arguments: tuple[str, ...], fields: tuple[str, ...] = ()) -> list[str]:
    """Run it, and return what is wrong with how it ends: one text, or none.

    Args:
        fields: of the arguments, those of which one must be named where it is refused.
    """
    with sandbox.world() as world:
        (world.work / "texts").mkdir()
        for number in range(20):
            (world.work / f"texts/{number}.txt").write_text(f"{number} hello world\n" * 100)
        before = tree(world.work)
        outcome = sandbox.run(world, program, *arguments)
        found = faults(outcome, before, world)
        if outcome.code == 2 and outcome.err.count("\n") != 1:
            found.append("more than one line")
        if outcome.code == 2 and fields and not names_one_of(fields, outcome.err):
            found.append("no field that was set is named")
        return [f"{program} {list(fields or arguments)}: {found}\n{outcome.err[-1500:]}"] if found else []


def train(sandbox: Sandbox, fields: tuple[str, ...]) -> list[str]:
    return check(sandbox, "train.py", (*TINY, *fields), fields)


def tool(sandbox: Sandbox, command: tuple[str, tuple[str, ...]]) -> list[str]:
    module, arguments = command
    return check(sandbox, module, (*LITTLE.get(module, ()), *arguments))


def try_cases(
    sandbox: Sandbox, number: int, strategy: SearchStrategy[Any], run: Callable[[Sandbox, Any], list[str]]
) -> None:
    """Run so many cases, and say all that went wrong, not the first alone."""
    found = []

    @sample(number)
    @given(strategy)
    def cases(drawn: Any) -> None:
        found.extend(run(sandbox, drawn))

    cases()
    assert not found, "\n".join([f"{len(found)} cases:", *found])


def test_fields_of_train(sandbox: Sandbox) -> None:
    try_cases(sandbox, 10, command_lines.field_overrides(), train)


def test_groups_of_train(sandbox: Sandbox) -> None:
    try_cases(sandbox, 5, command_lines.group_overrides(), train)


def test_tools(sandbox: Sandbox) -> None:
    try_cases(sandbox, 100, command_lines.tool_command_lines(), tool)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_six_hundred_of_fields(sandbox: Sandbox) -> None:
    try_cases(sandbox, 600, command_lines.field_overrides(), train)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_five_hundred_of_tools(sandbox: Sandbox) -> None:
    try_cases(sandbox, 500, command_lines.tool_command_lines(), tool)


@pytest.mark.slow
@pytest.mark.parametrize(("group", "kind"), GROUPS)
def test_every_group_with_every_kind(sandbox: Sandbox, group: str, kind: str) -> None:
    assert train(sandbox, (f"{group}={kind}",)) == []
