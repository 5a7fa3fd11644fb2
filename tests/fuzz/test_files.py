"""Whatever is in a file that is read, of any kind: it is read, or refused in a line; see judge.py."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import seeds
from tests.fuzz.judge import faults
from tests.fuzz.mutations import any_bytes
from tests.fuzz.sandbox import Sandbox, tree
from tests.fuzz.targets import READ_ONLY, RESUME, TARGETS, Target
from tests.fuzz.test_command_lines import sample
from tests.helpers_run import tiny_job


@pytest.fixture(scope="session")
def seeds_folder(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeds.make(sandbox, tmp_path_factory.mktemp("seeds") / "all")


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


def check(sandbox: Sandbox, folder: Path, target: Target, draw: Any) -> None:
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
        outcome = sandbox.run(world, reader[0], *command(target, reader))
        found = faults(outcome, before, world, writes=reader[0] not in READ_ONLY)
        what = f"{file.name} of {target.kind}, {how.__name__}, {' '.join(reader)}"
        assert not found, f"{what}: {found}\n{outcome.err[-1500:]}"


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.kind)
def test_an_undamaged_file_is_read(sandbox: Sandbox, seeds_folder: Path, target: Target) -> None:
    """Otherwise the cases below would show nothing."""
    with sandbox.world() as world:
        shutil.copytree(seeds_folder, world.work, dirs_exist_ok=True)
        reader = target.readers[0]
        outcome = sandbox.run(world, reader[0], *command(target, reader))
        assert outcome.code == 0, outcome.err


def drawn(data: st.DataObject) -> Any:
    return lambda choices: choices[data.draw(st.integers(0, len(choices) - 1))]


@sample(76)
@given(st.data())
def test_damaged_files(sandbox: Sandbox, seeds_folder: Path, data: st.DataObject) -> None:
    draw = drawn(data)
    check(sandbox, seeds_folder, draw(list(TARGETS)), draw)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.kind)
def test_thirty_five_of_each_kind(sandbox: Sandbox, seeds_folder: Path, target: Target) -> None:
    @sample(35)
    @given(st.data())
    def cases(data: st.DataObject) -> None:
        check(sandbox, seeds_folder, target, drawn(data))

    cases()
