"""trainer.strategy.param_dtype=bfloat16: what FSDP2 sends, that the stream stays in fp32, and who may not have it."""

from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import lightning as L
import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

from core.errors import ConfigError
from lightning_modules.strategy import ShardedStrategy
from tests.support.distributed_runs import Curve, Run
from tests.support.processes import QUIET, together
from tests.support.runs import TinyData, tiny_job, train

STEPS = 4
MODELS = {
    "dense": Run("fsdp", "dense", "spannorm", 2),
    "moe": Run("fsdp", "moe", "perinorm", 2),
    "layernorm": Run("fsdp", "dense", "spannorm", 2, options=(("norm", "layernorm"),)),
}


class Seen(NamedTuple):
    """What a run of one process showed.

    Attributes:
        losses: of every step.
        gathered, reduced: types that were sent.
        streams: types that blocks gave out.
    """

    losses: list[float]
    gathered: set[torch.dtype]
    reduced: set[torch.dtype]
    streams: set[torch.dtype]


def noting(seen: set[torch.dtype], kind: Any) -> Any:
    """Patch a collective of FSDP2, so that it notes the type of what it sends."""
    whole = kind.__call__

    def noted(self: Any, output_tensor: Any, input_tensor: Any, *rest: Any, **options: Any) -> Any:
        seen.add(input_tensor.dtype)
        return whole(self, output_tensor, input_tensor, *rest, **options)

    return mock.patch.object(kind, "__call__", noted)


class Streams(L.Callback):
    """Notes the types of what the blocks give out."""

    def __init__(self, seen: set[torch.dtype]) -> None:
        self.seen = seen

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        for block in pl_module.model.blocks:
            block.register_forward_hook(lambda _, __, out: self.seen.add(out[0].dtype))


def fit(folder: Path, job: tuple[str, str]) -> Seen:
    name, param_dtype = job
    seen = Seen([], set(), set(), set())
    torch.manual_seed(0)
    module, datamodule, curve = MODELS[name].make_module(), TinyData(folder, seq_len=16), Curve()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ShardedStrategy(param_dtype=param_dtype),
        precision="bf16-mixed",
        max_steps=STEPS,
        max_epochs=-1,
        limit_val_batches=0,
        log_every_n_steps=1,
        callbacks=[curve, Streams(seen.streams)],
        default_root_dir=folder,
        **QUIET,
    )
    datamodule.prepare_data()
    with (
        noting(seen.gathered, collectives.DefaultAllGather),
        noting(seen.reduced, collectives.DefaultReduceScatter),
    ):
        trainer.fit(module, datamodule=datamodule)
    seen.losses.extend(values["train/loss"] for values in curve.values)
    return seen


@pytest.mark.slow
def test_half_is_sent_the_stream_stays_whole_and_gradients_are_added_up_in_fp32(tmp_path: Path) -> None:
    jobs = [(name, param_dtype) for name in MODELS for param_dtype in ("float32", "bfloat16")]
    first, second = (dict(zip(jobs, found, strict=True)) for found in together(2, tmp_path, fit, jobs))
    for name in MODELS:
        whole, half = first[name, "float32"], first[name, "bfloat16"]
        assert second[name, "bfloat16"].losses == half.losses
        assert whole.gathered == {torch.float32}
        assert half.gathered == {torch.bfloat16, torch.float32}, "the blocks; embedding and head"
        assert whole.reduced == half.reduced == whole.streams == half.streams == {torch.float32}
        # Gains start at 1, and autocast rounds the matrices in any case, save the router's.
        assert half.losses[0] == pytest.approx(whole.losses[0], rel=1e-4 if name == "moe" else 0)
        assert half.losses[-1] == pytest.approx(whole.losses[-1], rel=5e-3)
        assert half.losses != whole.losses


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.strategy.param_dtype=float16"], "param_dtype='float16' is not valid: expected float32 or bfloat16"),
        (["trainer.strategy.param_dtype=bfloat16"], "expected float32, as trainer.precision=32-true is not bf16-mixed"),
    ],
)
def test_what_is_refused_before_anything_is_written(overrides: list[str], expected: str, tmp_path: Path) -> None:
    finished = train(tmp_path, *tiny_job("trainer=fsdp", "trainer.devices=1", *overrides), "run_dir=run")
    assert finished.code == 2
    assert expected in finished.err
    assert not (tmp_path / "run").exists()


def test_the_policy_is_refused_with_other_precisions() -> None:
    for precision in ("32-true", "16-mixed", "bf16-true", "64-true"):
        ShardedStrategy().check_precision(precision)
        with pytest.raises(ConfigError, match=precision):
            ShardedStrategy(param_dtype="bfloat16").check_precision(precision)
    ShardedStrategy(param_dtype="bfloat16").check_precision("bf16-mixed")
