"""Lines about what monitors measure, in real runs and with figures of the test's own."""

from pathlib import Path

import pytest

from callbacks.console.trouble import LIMITS, Trouble
from tests.support.runs import tiny_job, train

WITHOUT_NORM = ("model.placement=prenorm", "model.norm=none", "optim.lr=0.3", "optim.warmup_steps=0")


def test_a_run_in_trouble_says_so_once_and_not_again_when_it_is_resumed(tmp_path: Path) -> None:
    job = tiny_job("run_dir=run", *WITHOUT_NORM, "callbacks.representation_collapse.every_n_steps=1")
    job += ["callbacks.signal_propagation.every_n_steps=1", "optim.schedule=constant"]
    finished = train(tmp_path, *job, "trainer.max_steps=8")
    assert finished.code == 0, finished.err
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


def test_experts_that_stay_without_a_token_are_named(tmp_path: Path) -> None:
    job = tiny_job("run_dir=run", "model=moe", "model.moe.num_experts=64", "data.batch_size=1", "data.seq_len=8")
    finished = train(tmp_path, *job, "trainer.max_steps=8")
    assert finished.code == 0, finished.err
    (line,) = [line for line in finished.out.splitlines() if "got no token in 5 logged steps in a row" in line]
    assert line.startswith("step 5: ")
