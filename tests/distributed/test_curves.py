"""Two gloo processes, or four, have the curve of one with the same global batch, however the model is shared."""

import math
from pathlib import Path

import pytest

from tests.support.distributed_runs import STEPS, Run, train
from tests.support.processes import together

PLACEMENTS = ("spannorm", "prenorm", "siamesenorm")
CASES = [Run(strategy, "dense", placement, 2) for placement in PLACEMENTS for strategy in ("ddp", "fsdp")]
CASES += [Run(strategy, "moe", "spannorm", 2) for strategy in ("ddp", "fsdp")]
CASES += [Run("tp", num_processes=2), Run("ddp", micro_batch_size=1, num_processes=2, sources=True)]
CASES += [Run("fsdp", num_processes=2, clip=0.0)]  # not clipped at all
CASES += [Run("ddp", "dense", "spannorm", 2, images=True), Run("fsdp", "mlp", "siamesenorm", 2, images=True)]
NORMED = (("qk_norm", "width"), ("qkv_bias", True), ("head_dim", 6), ("num_kv_heads", 2))
CASES += [Run("tp", "dense", "prenorm", 2, options=NORMED)]
CASES += [Run("fsdp", "dense", "attnres", 2, options=(("norm", "gatednorm"),))]
# Norms inside attention and FFN, of which tensor parallelism leaves each process a part; a gate; tied weights.
INSIDE = ("hybridnorm", "outputnorm", "subln", "rezero")
MORE = [Run("tp", "dense", placement, 2) for placement in (*PLACEMENTS[1:], *INSIDE)]
MORE += [Run(strategy, "moe", placement, 2) for placement in PLACEMENTS[1:] for strategy in ("ddp", "fsdp")]
MORE += [Run("tp", "moe", placement, 2) for placement in PLACEMENTS]
MORE += [Run("tp", "moe", "subln", 2, options=(("tie_embeddings", True), ("num_kv_heads", 2)))]
MORE += [Run("tp", "dense", "outputnorm", 2, options=(("qk_norm", "head"), ("qkv_bias", True)))]
MORE += [Run("tp", "moe", "subln", 2, images=True)]
MORE += [Run("tp", "mlp", "subln", 2, options=(("bias", True),))]
MORE += [Run("fsdp", "dense", "hybridnorm", 2, options=NORMED)]
MORE += [Run("ep", "moe", placement, 2) for placement in PLACEMENTS]
MORE += [
    Run(strategy, "moe", "attnres", 2, options=(("activation_checkpointing", True),)) for strategy in ("ddp", "fsdp")
]
MORE += [Run("tp", "dense", "attnres", 2, options=(("placement_options", (("group", 3),)),))]
MORE += [Run("tp", "dense", placement, 2, options=(("norm", "gatednorm"),)) for placement in ("hybridnorm", "subln")]
MORE += [Run("fsdp", "dense", "prenorm", 2, optim=(("depth_scaling", "completep"), ("base_num_layers", 1)))]
MORE += [Run("fsdp", micro_batch_size=1, num_processes=2)]
# Many streams, with matrices of the placement's own.
STREAMS = [Run(strategy, "dense", "mhc", 2) for strategy in ("ddp", "fsdp", "tp")]
STREAMS += [Run("tp", "dense", "gr", 2), Run("fsdp", "moe", "gr", 2), Run("fsdp", "moe", "hc", 2)]
FOUR, FOUR_MORE = [Run("mesh", "moe", "spannorm", 4)], [Run("mesh", "dense", "subln", 4)]
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(CASES, id="data"),
        pytest.param(MORE, id="model", marks=slow),
        pytest.param(STREAMS, id="streams", marks=slow),
        pytest.param(FOUR, id="both"),
        pytest.param(FOUR_MORE, id="both, without experts", marks=slow),
    ],
)
def test_several_processes_have_the_curve_of_one(tmp_path: Path, cases: list[Run]) -> None:
    expected = {alone: train(tmp_path, alone) for alone in map(in_one_process, cases)}
    found = together(cases[0].num_processes, tmp_path, train, cases)
    for case, first, *others in zip(cases, *found, strict=True):
        wanted = expected[in_one_process(case)]
        assert len(wanted) == STEPS
        assert all(other == first for other in others), f"{case}: to the bit, on all ranks"
        sources = ("/even", "/odd") if case.sources else ()
        of_train, of_val = ([f"{split}/loss{source}" for source in ("", *sources)] for split in ("train", "val"))
        # Rounding tells them apart, as the next test shows, and most in the norm before clipping.
        for name, tolerance in (*((name, 3e-5) for name in of_train), ("optim/grad_norm", 1e-3)):
            curve = [metrics[name] for metrics in first]
            assert curve == pytest.approx([metrics[name] for metrics in wanted], rel=tolerance), f"{case}: {name}"
        for name in of_val:
            assert first[-1][name] == pytest.approx(wanted[-1][name], rel=3e-5), f"{case}: {name}"
        if case.images:
            for name in ("val/accuracy", "val/calibration_error"):
                assert first[-1][name] == pytest.approx(wanted[-1][name], rel=1e-3), f"{case}: {name}"
        else:
            assert first[-1]["val/perplexity"] == pytest.approx(math.exp(first[-1]["val/loss"]), rel=1e-5), case


@pytest.mark.slow
def test_rounding_alone_tells_them_apart(tmp_path: Path) -> None:
    cases = [case._replace(double=True) for case in CASES + MORE]
    expected = {alone: train(tmp_path, alone) for alone in map(in_one_process, cases)}
    found, _ = together(2, tmp_path, train, cases)
    for case, curve in zip(cases, found, strict=True):
        ours, theirs = (
            [step["optim/grad_norm"] for step in steps] for steps in (curve, expected[in_one_process(case)])
        )
        assert ours == pytest.approx(theirs, rel=1e-9), case


def in_one_process(run: Run) -> Run:
    return run._replace(strategy="one", num_processes=1, micro_batch_size=None)
