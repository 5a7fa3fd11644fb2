"""Every command that README.md, CONTRIBUTING.md and docs/ show is tried, as tests/support/documented_ways.py says."""

import shutil
from pathlib import Path

import pytest

from core import cli
from tests.support.documented_commands import PAGES, Command, commands
from tests.support.documented_ways import RUN, prepare, way_of

COMMANDS = [command for page in PAGES for command in commands(page)]
DIFFERENT = list({command.text: command for command in reversed(COMMANDS)}.values())[::-1]
"""Each once, where it is shown first."""
FIRST_READ = "README.md"


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    prepare(folder)
    return folder


@pytest.mark.parametrize(
    "command",
    [pytest.param(command, marks=[] if command.page == FIRST_READ else pytest.mark.slow) for command in DIFFERENT],
    ids=lambda command: f"{command.page}:{command.line}",
)
def test_it_works(command: Command, cwd: Path, tmp_path: Path) -> None:
    shutil.copytree(cwd, tmp_path, dirs_exist_ok=True)  # whatever the order, no command depends on another
    way = way_of(command)
    assert way is not None, f"tests/support/documented_ways.py does not know how to try: {command.text}"
    way(command, tmp_path)


def test_the_pages_have_commands() -> None:
    counts = {name: sum(command.page == name for command in COMMANDS) for name in ("README.md", "docs/data.md")}
    assert min(counts.values()) > 5, counts


def test_an_unknown_command_is_noticed() -> None:
    assert way_of(Command("page", 1, "frobnicate --all")) is None
    assert way_of(Command("page", 1, "python other.py")) is None


@pytest.mark.parametrize(
    "wrong",
    [
        "python train.py model.placment=postnorm",
        "python train.py experiment=moe_spannorm_gpu optim.rate=1",
        "python -m tools.compare RUN tagz=train/loss",
        "python -m tools.compare {RUN1,RUN2} --tags train/loss",
        "python -m tools.replay RUN stepp=5",
        "python -m tools.replay RUN step=fifth",
        "python -m tools.generate RUN promt=x",
        "python -m tools.evaluate RUN batch=5",
        "python -m tools.evaluate RUN tasks=ofline",
        "python -m tools.evaluate RUN tasks=offline limits=5",
        "python -m tools.export RUN outputs=exported/mine",
        "python -m tools.consolidate RUN checkpoint=first",
        "python -m tools.coordinate_check ffn=sparse",
        "python -m benchmarks.moe device=tpu",
        "python -m tools.nothing",
        "python -m tools nothing",
        "python -m tools.plan experiment=dense_7b mfuu=0.4",
        "python -m studies.run study=nothing",
        "pip install -r requirements-nothing.txt",
        "make nothing",
    ],
)
def test_a_wrong_command_fails(wrong: str, cwd: Path) -> None:
    command = Command("page", 1, wrong)
    way = way_of(command)
    assert way is not None
    with pytest.raises((AssertionError, *cli.MISTAKES)):
        way(command, cwd)


def test_commands_are_read_from_blocks_and_indented_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text python train.py no=1\n"
        "```bash\nmake train   # a comment\n# alone\nA=1 python train.py \\\n    a='#b' c=1  # more\n```\n"
        "```python\nmake nothing\n```\n\n"
        "    python -m tools.runs \\\n      runs\n    not a command\n```sh\n$ anything at all\n```\n"
    )
    assert list(commands(page)) == [
        ("page.md", 3, "make train"),
        ("page.md", 5, "A=1 python train.py a='#b' c=1"),
        ("page.md", 12, "python -m tools.runs runs"),
        ("page.md", 16, "anything at all"),
    ]
    assert list(commands(page))[1].words == ["python", "train.py", "a=#b", "c=1"]
    assert list(commands(page))[1].arguments == ["a=#b", "c=1"]


def test_the_example_run_is_one(cwd: Path) -> None:
    assert (cwd / RUN / "summary.json").is_file()
