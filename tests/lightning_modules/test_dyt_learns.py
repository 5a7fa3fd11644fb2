"""DyT learns a language model from inits of 0.02, as it starts now and not as it did: docs/placements.md#dyt."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import corpus_root, train

JOB = [
    "experiment=dense_prenorm",
    "model.norm=dyt",
    "model.dim=64",
    "model.num_heads=2",
    "data.seq_len=64",
    "trainer.accelerator=cpu",
    "callbacks.text_sample=null",
    "logger=csv",
    "trainer.max_steps=600",
]
FORMER = [f"model.norm_options.{value}" for value in ("alpha=0.5", "alpha_attention=0.5", "embedding_scale=null")]


@pytest.mark.slow
def test_it_learns_more_than_pairs_of_bytes(tmp_path: Path) -> None:
    def trained(name: str, *overrides: str) -> Any:
        finished = train(tmp_path, *JOB, f"data.root={corpus_root()}", f"run_dir={name}", *overrides)
        assert finished.code == 0, finished.err
        return json.loads((tmp_path / name / "summary.json").read_text())

    now, before = trained("now"), trained("before", *FORMER)
    assert now["val_loss"] < now["bigram_loss"] - 0.2
    assert now["val_loss"] < before["val_loss"] - 0.2
