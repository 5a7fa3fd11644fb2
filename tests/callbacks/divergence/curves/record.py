"""Record the curves that the detectors are held against, in 15 minutes:

    python -m tests.callbacks.divergence.curves.record

Real runs of train.py on the standard library's source, 200 steps each, loss and gradient norm of every step. Writes
healthy.json and diverging.json beside itself: {name: {"fault": the step it struck, or null, "loss": [...],
"grad_norm": [...]}}.
"""

import json
import math
import tempfile
from pathlib import Path

from tests.support.runs import scalars, train

STEPS = 200
Job = tuple[str, ...]

COMMON = (
    "model.dim=32",
    "model.num_heads=2",
    "model.num_layers=2",
    "model.moe.num_experts=4",
    "model.moe.expert_dim=32",
)
COMMON += ("data.seq_len=32", "data.batch_size=8", "data.val_batches=1", "callbacks.text_sample=null")
COMMON += (f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu")
COMMON += ("optim.warmup_steps=20",)

HEALTHY: dict[str, Job] = {
    "prenorm": ("model.placement=prenorm",),
    "prenorm, seed 1": ("model.placement=prenorm", "seed=1"),
    "prenorm, high lr": ("model.placement=prenorm", "optim.lr=1e-2"),
    "prenorm, low lr": ("model.placement=prenorm", "optim.lr=3e-4"),
    "prenorm, small batches": ("model.placement=prenorm", "data.batch_size=4", "seed=2"),
    "prenorm, no warm-up": ("model.placement=prenorm", "optim.warmup_steps=0", "seed=3"),
    "prenorm, 8 blocks": ("model.placement=prenorm", "model.num_layers=8"),
    "spannorm": ("model.placement=spannorm",),
    "spannorm, 6 blocks": ("model.placement=spannorm", "model.num_layers=6", "seed=4"),
    "spannorm, dim 64": ("model.placement=spannorm", "model.dim=64", "optim.lr=5e-3"),
    "spannorm, moe": ("model.placement=spannorm", "model.ffn=moe"),
    "spannorm, moe, 4 blocks": ("model.placement=spannorm", "model.ffn=moe", "model.num_layers=4", "seed=5"),
    "prenorm, moe, constant": ("model.placement=prenorm", "model.ffn=moe", "optim.schedule=constant", "seed=6"),
    "prenorm, wsd": ("model.placement=prenorm", "optim.schedule=wsd", "optim.decay_fraction=0.4"),
    "postnorm": ("model.placement=postnorm", "optim.lr=1e-3"),
    "deepnorm, 6 blocks": ("model.placement=deepnorm", "model.num_layers=6"),
    "sandwich": ("model.placement=sandwich", "seed=7"),
    "hybridnorm, layernorm": ("model.placement=hybridnorm", "model.norm=layernorm", "seed=8"),
    "siamesenorm": ("model.placement=siamesenorm", "model.num_layers=4"),
    "rezero, accumulated": ("model.placement=rezero", "trainer.accumulate_grad_batches=2", "seed=9"),
}


RAMP = ("optim.warmup_steps=100",)  # the model learns first, and is then lost
FREE = "trainer.gradient_clip_val=null"


def bad_batch(step: int) -> str:
    return f"+callbacks.fault={{_target_: tests.support.sabotage.BadBatch, first: {step}}}"


def flipped_bit(step: int, parameter: str, entry: int) -> str:
    target = "_target_: tests.support.sabotage.FlipBit"
    return f"+callbacks.fault={{{target}, step: {step}, parameter: {parameter}, entry: {entry}}}"


DIVERGING: dict[str, tuple[int | None, Job]] = {
    "lr: postnorm, 4 blocks": (None, (*RAMP, "model.placement=postnorm", "model.num_layers=4", "optim.lr=0.1", FREE)),
    "lr: deepnorm, 6 blocks": (None, (*RAMP, "model.placement=deepnorm", "model.num_layers=6", "optim.lr=1.0", FREE)),
    "lr: prenorm, no norm": (None, (*RAMP, "model.placement=prenorm", "model.norm=none", "optim.lr=0.1")),
    "lr: prenorm, no norm, 8 blocks": (
        None,
        ("model.placement=prenorm", "model.norm=none", "model.num_layers=8", "optim.lr=0.02"),
    ),
    "lr: prenorm, constant": (None, (*RAMP, "model.placement=prenorm", "optim.lr=3.0", "optim.schedule=constant")),
    "lr: spannorm": (None, ("model.placement=spannorm", "optim.lr=3.0", "optim.warmup_steps=150")),
    "lr: moe": (None, ("model.placement=prenorm", "model.ffn=moe", "optim.lr=1.0", "optim.warmup_steps=150")),
    "batch: prenorm": (120, ("model.placement=prenorm",)),
    "batch: prenorm, early": (45, ("model.placement=prenorm", "seed=1")),
    "batch: prenorm, 6 blocks": (100, ("model.placement=prenorm", "model.num_layers=6", "seed=2")),
    "batch: spannorm": (150, ("model.placement=spannorm", "seed=3")),
    "batch: postnorm": (80, ("model.placement=postnorm", "optim.lr=1e-3")),
    "batch: moe": (170, ("model.placement=spannorm", "model.ffn=moe", "seed=4")),
    "batch: small batches": (130, ("model.placement=prenorm", "data.batch_size=4", "seed=5")),
    "bit: head": (90, ("model.placement=prenorm",)),
    "bit: gate": (110, ("model.placement=prenorm", "seed=1")),
    "bit: attention": (60, ("model.placement=postnorm", "optim.lr=1e-3")),
    "bit: ffn": (140, ("model.placement=spannorm", "seed=2")),
    "bit: norm": (100, ("model.placement=prenorm", "seed=3")),
    "bit: moe": (50, ("model.placement=prenorm", "model.ffn=moe", "seed=4")),
}
STRUCK = {
    "bit: head": ("head.weight", 32 * ord("e")),
    "bit: gate": ("blocks.0.ffn.gate_proj.weight", 0),
    "bit: attention": ("blocks.0.attn.o_proj.weight", 7),
    "bit: ffn": ("blocks.1.ffn.down_proj.weight", 100),
    "bit: norm": ("blocks.1.placement.norm_ffn.weight", 3),
    "bit: moe": ("blocks.0.attn.o_proj.weight", 50),
}


def job(name: str) -> tuple[int | None, Job]:
    """(the step of the fault, all overrides)."""
    if name in HEALTHY:
        return None, COMMON + HEALTHY[name]
    step, overrides = DIVERGING[name]
    if step is None:
        return None, COMMON + overrides
    return step, (*COMMON, *overrides, flipped_bit(step, *STRUCK[name]) if name in STRUCK else bad_batch(step))


def record(name: str, folder: Path) -> dict[str, object]:
    """Train, and read the curves back from TensorBoard's file."""
    fault, overrides = job(name)
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    finished = train(folder, *overrides, "data.root=data", f"run_dir={run}")
    assert finished.code == 0, finished.err
    curves = {
        key: rounded(scalars(run, tag)) for key, tag in (("loss", "train/loss"), ("grad_norm", "optim/grad_norm"))
    }
    return {"fault": fault, **curves}


def rounded(scalars: dict[int, float]) -> list[float]:
    return [float(f"{value:.4g}") if math.isfinite(value) else value for value in scalars.values()]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for file, names in (("healthy", HEALTHY), ("diverging", DIVERGING)):
            curves = {}
            for name in names:
                curves[name] = record(name, Path(folder))
                print(name, curves[name]["loss"][-1], flush=True)  # type: ignore[index]
            lines = [f"{json.dumps(name)}: {json.dumps(curve)}" for name, curve in curves.items()]
            Path(__file__).with_name(f"{file}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
