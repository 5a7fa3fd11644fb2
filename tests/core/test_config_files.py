"""A configuration file of the user's has an effect, or is refused in one line that names it."""

from pathlib import Path

import pytest

from tests.support.runs import Finished, tiny_job, train

HEADER = "# @package _global_\n"


def trained(cwd: Path, content: bytes, *overrides: str) -> Finished:
    """As with `experiment=mine`, of which the file holds the content."""
    (cwd / "conf/experiment").mkdir(parents=True)
    (cwd / "conf/experiment/mine.yaml").write_bytes(content)
    few = ("run_dir=run", "trainer.max_steps=1", "logger=csv")
    return train(cwd, "--config-dir", "conf", "experiment=mine", *tiny_job(*few, *overrides))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: b: c\n", "mine.yaml cannot be read as a configuration: mapping values are not allowed here"),
        ("optim:\n\tlr: 1\n", "mine.yaml cannot be read as a configuration: while scanning"),
        ("seed: 1\nseed: 2\n", "found duplicate key seed"),
        ("seed: *x\n", "found undefined alias 'x'"),
        ("x: &a [*a]\n", "it is nested too deep, or holds itself"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("seed: !!python/object/apply:os.system ['touch hacked']\n", "could not determine a constructor for the tag"),
        (b"# \xe9\n", "mine.yaml cannot be read as a configuration: 'utf-8' codec can't decode byte 0xe9"),
        (b"\x00", "mine.yaml cannot be read as a configuration: unacceptable character #x0000"),
        ("# @package\nseed: 1\n", "Expected header format: KEY VALUE, got '@package'"),
        ("defaults: {a: b}\n", "Invalid defaults list in 'experiment/mine', defaults must be a list"),
        ("defaults:\n  - /experiment/mine\n", "a configuration file is among its own defaults"),
        ("defaults:\n  - override /model: nosuch\n", "model='nosuch' is not valid: expected one of dense, moe"),
    ],
)
def test_one_that_cannot_be_read_is_named(content: str | bytes, said: str, tmp_path: Path) -> None:
    finished = trained(tmp_path, content if isinstance(content, bytes) else (HEADER + content).encode())
    assert_refused(finished, said, tmp_path)


def assert_refused(finished: Finished, said: str, cwd: Path) -> None:
    """In one line, before anything is written."""
    assert finished.code == 2, finished.err
    assert said in finished.err
    assert finished.err.startswith("Error: ")
    assert finished.err.count("\n") == 1
    assert {path.name for path in cwd.iterdir()} == {"conf"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "optim:\n  lr: 5\n",
            "experiment={'optim': {'lr': 5}} is not valid: without '# @package _global_' as its first",
        ),
        ("- a\n", "experiment=['a'] is not valid: without '# @package _global_'"),
        ("\ufeff" + HEADER + "seed: 5\n", "experiment={'seed': 5} is not valid: without '# @package _global_'"),
        (HEADER + "optmi:\n  lr: 5\n", "optmi={'lr': 5} is not valid: no such field; one of "),
        (HEADER + "optmi:\n  lr: 5\n", "(did you mean optim?)"),
        (
            HEADER + "optim.lr: 5\n",
            "optim.lr=5 is not valid: a field of a group is set below it in a file: 'optim: {lr",
        ),
        (HEADER + "1: 2\n", "1=2 is not valid: no such field"),
        (
            HEADER + "optim:\n  lrr: 5\n",
            "in the configuration experiment/mine: optim.lrr is not valid: no such field",
        ),
        (HEADER + "optim:\n  lr: fast\n", "experiment/mine: optim.lr='fast' is not valid: expected a number"),
        (
            HEADER + "model:\n  moe:\n    experts: 8\n",
            "experiment/mine: model.moe.experts is not valid: no such field",
        ),
        (HEADER + "data:\n  seqlen: 5\n", "data.seqlen=5 is not valid: no such field; "),
    ],
)
def test_what_would_have_no_effect_is_refused(content: str, said: str, tmp_path: Path) -> None:
    assert_refused(trained(tmp_path, content.encode()), said, tmp_path)


def test_nor_is_a_field_added_on_the_command_line_that_nothing_reads(tmp_path: Path) -> None:
    refused = train(tmp_path, *tiny_job("run_dir=run", "+optmi.lr=5"))
    assert refused.code == 2
    assert "optmi={'lr': 5} is not valid: no such field" in refused.err
    assert not (tmp_path / "run").exists()


def test_a_field_of_ones_own_to_which_others_refer_has_one(tmp_path: Path) -> None:
    finished = trained(tmp_path, (HEADER + "my_rate: 0.25\noptim:\n  lr: ${my_rate}\n").encode())
    assert finished.code == 0, finished.err
    assert "lr: 0.25" in (tmp_path / "run/config.yaml").read_text()


def test_turning_off_what_is_not_there_is_said(tmp_path: Path) -> None:
    content = HEADER + "callbacks:\n  progres: null\n  text_sample: null\n  mine: null\n"
    finished = trained(tmp_path, content.encode())
    assert finished.code == 0, finished.err
    assert "callbacks.progres=null turns nothing off (did you mean progress?)\n" in finished.out
    assert finished.out.count("turns nothing off") == 1
