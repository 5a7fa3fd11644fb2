"""Lines about what monitors measure, in real runs and with figures of the test's own."""

import math
from pathlib import Path

import pytest

from callbacks.console.trouble import LIMITS, Trouble
from tests.support.runs import tiny_job, train

WITHOUT_NORM = ("model.placement=prenorm", "model.norm=none", "optim.lr=0.3", "optim.warmup_steps=0")


def test_a_run_in_trouble_says_so_once_and_not_again_when_it_is_resumed(tmp_path: Path) -> None:
    job = tiny_job("run_dir=run", *WITHOUT_NORM, "callbacks.representation_collapse.every_n_steps=1")
    job += ["callbacks.signal_propagation.every_n_steps=1", "optim.schedule=constant"]
    finished = train(tmp_path, *job, "trainer.max_steps=8")
    lines = [line for line in finished.out.splitlines() if "in block" in line]
    assert lines, finished.out
    keys = [line.split(": ")[2].split(" is ")[0] for line in lines]
    assert len(set(keys)) == len(keys), "each once"
    again = train(tmp_path, *job, "trainer.max_steps=12", "ckpt_path=last")
    assert not [line for line in again.out.splitlines() if any(f"{key} is" in line for key in keys)]


def test_a_run_like_any_other_says_nothing(tmp_path: Path) -> None:
    finished = train(tmp_path, *tiny_job("run_dir=run", "callbacks.signal_propagation.every_n_steps=1"))
    assert finished.code == 0
    assert not [line for line in finished.out.splitlines() if "in block" in line or "no token" in line]


def test_it_names_the_block_that_is_farthest_out(capsys: pytest.CaptureFixture[str]) -> None:
    callback = Trouble()
    values = {f"signal/block_{n}/attn_logit_max": value for n, value in enumerate((99.0, 200.0, 150.0), start=1)}
    assert callback.choose_scalars(values, 7) == values
    words = LIMITS["signal/attn_logit_max"].words
    assert capsys.readouterr().out == f"step 7: {words}: signal/attn_logit_max is 200 in block 2\n"
    callback.choose_scalars(values, 8)
    assert capsys.readouterr().out == ""
    callback.choose_scalars({"representation/block_4/effective_rank": 1.1, "signal/block_1/variance": 1e9}, 9)
    assert "representation/effective_rank is 1.1 in block 4" in capsys.readouterr().out


def test_what_is_no_number_gets_one_line_and_no_diagnosis(capsys: pytest.CaptureFixture[str]) -> None:
    callback = Trouble()
    values = {f"signal/block_{n}/{figure}": math.nan for n in (3, 2, 10) for figure in ("kurtosis", "attn_logit_max")}
    callback.choose_scalars({**values, "representation/block_3/token_cosine": math.inf}, 5)
    line = "step 5: figures of the blocks are no numbers: signal/attn_logit_max from block 2 on\n"
    assert capsys.readouterr().out == line
    callback.choose_scalars(values, 6)
    assert capsys.readouterr().out == "", "once"


@pytest.mark.parametrize(
    ("tag", "healthy", "out"),
    [
        ("signal/block_1/attn_entropy", 0.03, 0.01),
        ("signal/block_1/attn_logit_max", 99, 101),
        ("signal/block_1/kurtosis", 99, 101),
        ("representation/block_1/token_cosine", 0.98, 0.995),
        ("representation/block_1/effective_rank", 1.3, 1.1),
    ],
)
def test_each_figure_has_its_limit(tag: str, healthy: float, out: float, capsys: pytest.CaptureFixture[str]) -> None:
    callback = Trouble()
    callback.choose_scalars({tag: healthy}, 1)
    assert capsys.readouterr().out == ""
    callback.choose_scalars({tag: out}, 2)
    assert capsys.readouterr().out.startswith("step 2: ")


def test_experts_that_stay_without_a_token_are_named(tmp_path: Path) -> None:
    job = tiny_job("run_dir=run", "model=moe", "model.moe.num_experts=64", "data.batch_size=1", "data.seq_len=8")
    finished = train(tmp_path, *job, "trainer.max_steps=8")
    assert finished.code == 0, finished.err
    (line,) = [line for line in finished.out.splitlines() if "got no token in 5 logged steps in a row" in line]
    assert line.startswith("step 5: ")
