"""What every command line owes its user, whatever it was given."""

import re
from collections.abc import Iterable

from tests.support.fuzz.sandbox import GROWTH, Outcome, World, tree

ENDINGS = {0: "done", 2: "refused in one line", 3: "diverged"}


def faults(
    outcome: Outcome, before: dict[str, object], world: World, writes: bool = True, is_text: bool = False
) -> list[str]:
    """What is wrong with how a case ended, in words; empty: nothing.

    Args:
        outcome: how it ended.
        before: `tree` of the working folder, before.
        world: in which it ran.
        writes: it may write into its working folder, where it is not refused.
        is_text: what it prints is a text that a model has written, which a pipe gets as it is.
    """
    found = []
    if outcome.code not in ENDINGS:
        found.append(
            f"exit code {outcome.code}" + (", which is a limit of time" if outcome.code in (-14, -9, -24) else "")
        )
    if "Traceback" in outcome.err:
        found.append("a traceback")
    if outcome.code == 2 and not re.search(r"^Error: .", outcome.err, re.MULTILINE):
        found.append("no line that says what is wrong")
    if any(ord(c) < 32 and c not in "\n\t\r" for c in outcome.err + ("" if is_text else outcome.out)):
        found.append("control characters in what it prints")
    if outcome.memory > GROWTH:
        found.append(f"{outcome.memory >> 20} MiB of memory")
    if outcome.left:
        found.append("a process is left")
    if outcome.touched:
        found.append(f"it touched {outcome.touched.strip()}")
    try:
        world.assert_untouched()
    except AssertionError as error:
        found.append(str(error).partition("\n")[0])
    new = sorted(set(tree(world.work).items()) ^ set(before.items())) if outcome.code == 2 or not writes else []
    if new:
        found.append(f"the working folder has changed: {sorted({name for name, _ in new})[:5]}")
    if any(world.root.joinpath("tmp").iterdir()):
        found.append("something is left in TMPDIR")
    return found


def names_one_of(arguments: Iterable[str], message: str) -> bool:
    """Whether a message names, dotted and whole, a field that was set, a group of it, or a field in it; or the text."""
    for argument in arguments:
        name = argument.partition("=")[0].lstrip("+~@")
        parts = name.split(".")
        names = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        if any(re.search(rf"(?<![\w.]){re.escape(part)}(?!\w)", message) for part in names if part) or not name:
            return True
        if repr(argument) in message or "overrid" in message:
            return True
    return False
