"""Whatever is in a file that is read, of any kind: it is read, or refused in a line; see judge.py."""

import json
import random
import shutil
from pathlib import Path

import pytest

from tests.support.fuzz import seeds
from tests.support.fuzz.judge import faults
from tests.support.fuzz.mutations import Draw, any_bytes
from tests.support.fuzz.sandbox import Outcome, Sandbox, World, tree
from tests.support.fuzz.targets import ANSWERS, READ_ONLY, REMOTE, REPORT, RESUME, TARGETS, Target
from tests.support.runs import tiny_job

QUICK = [target for target in TARGETS if target.readers[0] not in (RESUME, REPORT, REMOTE)]


def command(target: Target, reader: tuple[str, ...]) -> list[str]:
    """The reader's arguments, for the folder of the target."""
    if reader == RESUME:
        parts = ["trainer=fsdp", "trainer.devices=1"] if target.folder == "pieces" else list(seeds.SNAPSHOTS)
        return [
            *tiny_job("trainer.max_steps=4", "trainer.val_check_interval=3"),
            *parts,
            f"run_dir={target.folder}",
            "ckpt_path=last",
        ]
    words = [word.format(target.folder) for word in reader[1:]]
    if reader[:1] == ("train.py",):
        tiny = [word for word in tiny_job("trainer.max_steps=1") if not word.startswith("data.root=")]
        return [*tiny, *words]
    return words


def fetch(sandbox: Sandbox, world: World, folder: Path, name: str, answer: str | None) -> Outcome:
    """Train on what a server on this machine says that the folder holds."""
    from tests.support.servers import http_server  # which takes a while to import

    with http_server(folder) as server:
        kind = getattr(server, answer) if answer else set()
        wrong = {"endless": 1 << 20, "elsewhere": f"{server.address}/{name}", "truncating": 3, "failing": 1}
        kind.add(name) if isinstance(kind, set) else kind.update({name: wrong[answer or ""]})
        words = [word.format(address=server.address, cache=world.cache) for word in REMOTE[1:]]
        tiny = [word for word in tiny_job("trainer.max_steps=1") if not word.startswith("data.root=")]
        return sandbox.run(world, REMOTE[0], *tiny, *words, port=server.server_port)


def check(sandbox: Sandbox, folder: Path, target: Target, draw: Draw) -> None:
    """Damage a copy and let one of its readers at it."""
    with sandbox.world() as world:
        source = folder / target.folder
        copy = world.work / target.folder
        shutil.copytree(source, copy) if source.is_dir() else shutil.copyfile(source, copy)
        if target.kind == "tokenizer":
            shutil.copytree(folder / "texts", world.work / "texts")
        files = sorted(path for path in copy.glob(target.files) if path.is_file()) if target.files else [copy]
        file, reader = draw(files), draw(list(target.readers))
        how = draw([*target.how, *target.how, *target.how, any_bytes, any_bytes, *target.anything])
        how(file, draw, world.canary)
        before = tree(world.work)
        if reader == REMOTE:
            outcome = fetch(sandbox, world, copy, file.name, draw(list(ANSWERS)))
        else:
            outcome = sandbox.run(world, reader[0], *command(target, reader))
        is_text = reader[0] == "tools.generate"
        if any(json.loads(path.read_text())["step"] for path in world.work.glob("runs/*/*/status.json")):
            # A corpus is read while a run trains: what is wrong with it may show after a step, and then the run stays.
            before = tree(world.work)
        found = faults(outcome, before, world, writes=reader[0] not in READ_ONLY, is_text=is_text)
        what = f"{file.name} of {target.kind}, {how.__name__}, {' '.join(reader)}"
        assert not found, f"{what}: {found}\n{outcome.err[-1500:]}"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.kind)
def test_an_undamaged_file_is_read(sandbox: Sandbox, seeds_folder: Path, target: Target) -> None:
    """Otherwise the cases below would show nothing."""
    with sandbox.world() as world:
        shutil.copytree(seeds_folder, world.work, dirs_exist_ok=True)
        for reader in target.readers:
            if reader == REMOTE:
                outcome = fetch(sandbox, world, world.work / target.folder, "index.json", None)
            else:
                outcome = sandbox.run(world, reader[0], *command(target, reader))
            assert outcome.code == 0, outcome.err


def try_cases(sandbox: Sandbox, folder: Path, target: Target, numbers: range) -> None:
    """The same cases each time: what is drawn follows from the kind and the number. All that went wrong is said."""
    found = []
    for number in numbers:
        try:
            check(sandbox, folder, target, random.Random(f"{target.kind} {number}").choice)
        except AssertionError as error:
            found.append(f"case {number}: {error}")
    assert not found, "\n".join([f"{len(found)} cases:", *found])


@pytest.mark.parametrize("target", QUICK, ids=lambda target: target.kind)
def test_two_of_each_kind_by_its_first_reader(sandbox: Sandbox, seeds_folder: Path, target: Target) -> None:
    try_cases(sandbox, seeds_folder, target._replace(readers=target.readers[:1]), range(2))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.kind)
def test_thirty_of_each_kind(sandbox: Sandbox, seeds_folder: Path, target: Target) -> None:
    try_cases(sandbox, seeds_folder, target, range(2, 32))
