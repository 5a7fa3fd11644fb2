"""A model in two processes starts from the weights of a run in one, and another one from its pieces."""

from pathlib import Path

import pytest
import torch

from core.checkpoint import load
from tests.support.processes import command_line, together
from tests.support.runs import run, tiny_job, train

STILL = ["trainer.max_steps=1", "optim.lr=0", "optim.weight_decay=0"]
MOE = ["experiment=moe_spannorm", "model.moe.balancing=bias", "model.moe.bias_update_rate=1e-9"]
TWO = ["trainer=fsdp", "trainer.devices=2"]
WAYS = {
    "sharded": TWO,
    "tensor_parallel": [*TWO, "trainer.strategy.tensor_parallel_size=2"],
    "expert_parallel": [*TWO, "model.moe.expert_parallel=2"],
    "ddp": ["trainer=ddp", "trainer.devices=2"],
}


@pytest.mark.slow
def test_weights_are_the_same_in_any_number_of_processes(tmp_path: Path) -> None:
    first = run(tmp_path, "first", *MOE, "trainer.max_steps=2", "optim.lr=1e-2")
    expected = load(first / "checkpoints/last.ckpt")["state_dict"]
    jobs = [tiny_job(*MOE, *STILL, *way, f"init_from={first}", f"run_dir={name}") for name, way in WAYS.items()]
    for rank in together(2, tmp_path, command_line, jobs):
        assert [finished.code for finished in rank] == [0] * len(WAYS), rank
    back = train(tmp_path, *tiny_job(*MOE, *STILL, "init_from=sharded", "run_dir=back"))
    assert back.code == 0, back.err
    for name in (*WAYS, "back"):
        found = load(tmp_path / name / "checkpoints/last.ckpt")["state_dict"]
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=0 if "bias" not in key else 1e-6)
