"""docs/metrics.md against the keys that runs really write, in both directions."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from core.event_files import OVERVIEW
from tests.support.runs import ROOT, events, run
from tools import evaluate

KINDS = ("attn_in", "attn_out", "ffn_up", "ffn_down", "norm", "residual", "router", "experts", "embedding", "head")
STEPS = 8


class Poison(L.Callback):
    """In the last step, makes one entry of a block's, the embedding's and the head's gradient infinite."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step == STEPS - 1:
            model = pl_module.model
            for parameter in (model.blocks[0].attn.o_proj.weight, model.embedding.weight, model.head.weight):
                parameter.grad[0, 0] = float("inf")


def documented() -> set[str]:
    rows = [line for line in (ROOT / "docs/metrics.md").read_text().splitlines() if line.startswith("| `")]
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row.split("|")[1])}


def generic(tag: str) -> str:
    """A tag as the page has it: with BLOCK, LAYER and KIND."""
    tag = re.sub(r"block_\d+", "block_BLOCK", re.sub(r"layer_\d+", "layer_LAYER", tag))
    tag = re.sub(r"_share_\d+$", "_share_STREAM", tag)
    tag = re.sub(r"(block_BLOCK)/(attn|ffn|out)/from_\d+", r"\1/SUBLAYER/from_SOURCE", tag)
    tag = re.sub(r"^(gates/block_BLOCK)/[a-z_.]+$", r"\1/PART", tag)
    tag = re.sub(r"^eval/\w+/", "eval/NAME/", tag)
    head, _, last = tag.rpartition("/")
    return f"{head}/KIND" if last in KINDS and "BLOCK" in head else tag


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    cwd = tmp_path_factory.mktemp("runs")
    everything = [
        f"trainer.max_steps={STEPS}",
        "trainer.accumulate_grad_batches=4",
        "trainer.val_check_interval=32",
        "callbacks.throughput.peak_flops=1.0e9",
        "+callbacks.curvature._target_=callbacks.monitors.curvature.Curvature",
        "+callbacks=anatomy",
        "callbacks.anatomy.tokens=64",
        f"+callbacks.poison._target_={__name__}.Poison",
    ]
    jobs = ("dense_spannorm", "moe_spannorm")
    folders = [run(cwd, name, f"experiment={name}", *everything, code=3) for name in jobs]
    folders.append(run(cwd, "sources", "model.placement=attnres", "model.norm=gatednorm", "trainer.max_steps=1"))
    for name in ("hc", "gr"):
        folders.append(run(cwd, name, f"model.placement={name}", "trainer.max_steps=1", "trainer.val_check_interval=1"))
    evaluate.main([str(folders[0]), f"allow={Poison.__module__}.Poison"])
    tags = {tag for folder in folders for tag in events(Path(folder)).Tags()["scalars"]}
    return {generic(tag) for tag in tags if not tag.startswith(f"{OVERVIEW}/")}


def test_every_key_is_documented(written: set[str]) -> None:
    assert written - documented() == set()


def test_every_documented_key_is_written(written: set[str]) -> None:
    assert documented() - written == set()
