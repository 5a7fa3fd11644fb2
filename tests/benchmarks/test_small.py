"""The benchmark of small runs: several models as one compute what each computes by itself."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import small
from tests.support.runs import corpus_root

JOB = (*small.JOB, "model.num_layers=2", "model.dim=32", "data.seq_len=16", "data.batch_size=2")


def test_several_models_as_one_have_the_losses_and_gradients_of_each() -> None:
    models = [small.make_model(JOB, seed, "off") for seed in range(3)]
    tokens = torch.randint(small.VOCAB_SIZE, (3, 2, 17))
    parameters, losses = small.losses_of(models, tokens)
    losses().sum().backward()
    for number, model in enumerate(models):
        logits, _ = model(tokens[number, :, :-1])
        alone = F.cross_entropy(logits.flatten(0, 1), tokens[number, :, 1:].flatten())
        torch.testing.assert_close(losses()[number], alone)
        alone.backward()
        for stacked, parameter in zip(parameters, model.parameters(), strict=True):
            assert stacked.grad is not None
            torch.testing.assert_close(stacked.grad[number], parameter.grad, rtol=1e-4, atol=1e-6)


def test_flops_are_those_of_the_blocks_products() -> None:
    model = small.make_model(JOB, 0)
    _, flops = small.products(model, 10)
    weights = sum(p.numel() for name, p in model.blocks.named_parameters() if p.dim() == 2)
    assert flops == 6 * 10 * weights


@pytest.mark.slow  # a run by train.py
def test_it_runs_and_writes_its_report(tmp_path: Path) -> None:
    job = ",".join((*JOB, f"data.root={corpus_root()}"))
    small.main(["models=[2]", "steps=4", "rounds=1", f"job=[{job}]", f"output={tmp_path}/small.md"])
    text = (tmp_path / "small.md").read_text()
    assert "\n| 2 | " in text
    assert "train.py takes " in text
