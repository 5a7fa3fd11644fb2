"""The host runs ahead of the device: between two logged steps it waits for nothing that the device computes."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from core.build import build_all
from lightning_modules.composing import compose_run
from lightning_modules.layers.expert_products import ONE_KERNEL
from tests.support.fitting import Recorder, loader, make_trainer
from tests.support.models import make_module, tokens
from tests.support.synchronizations import Counting, counting

LOGGED, STEPS, ACCUMULATE = 5, 9, 4
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {"ffn": "moe", "moe": {"backend": "grouped", "expert_dim": 32, "balancing": "bias"}},
    "siamesenorm": {"placement": "siamesenorm"},
    "mhc": {"placement": "mhc"},
}


class Between(L.Callback):
    """Turns something on for the steps that are not logged, of which the first, with its samples, is none."""

    def __init__(self, turn: Any) -> None:
        self.turn = turn

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step + 1
        self.turn(1 < step < STEPS and step % LOGGED != 0)

    def on_train_end(self, *_: Any) -> None:
        self.turn(False)


def callbacks(folder: Path, chosen: str) -> list[L.Callback]:
    """None, those of a default run, or all groups of these but divergence."""
    groups = {"none": "[]", "all": "[default]", "all but divergence": "[monitors,checkpointing,console]"}[chosen]
    return build_all(compose_run([f"run_dir={folder}", f"callbacks={groups}"]), "callbacks")


def train(folder: Path, model: str, chosen: str, turn: Any, **options: Any) -> None:
    module = make_module({"schedule": "cosine"}, cpu_kernels="off", **MODELS[model])
    trainer = make_trainer(
        folder,
        limit_val_batches=0,
        max_steps=STEPS,
        log_every_n_steps=LOGGED,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=1.0,
        logger=Recorder(),
        callbacks=[Between(turn), *callbacks(folder, chosen)],
        enable_checkpointing=True,
        enable_progress_bar=True,
        **options,
    )
    batches = loader(*[tokens(2, 9)] * STEPS * ACCUMULATE)
    trainer.fit(module, batches, batches)


@pytest.mark.parametrize(
    ("model", "chosen", "a_step"),
    [*((model, "all but divergence", 0) for model in MODELS), ("moe", "none", 0), ("moe", "all", 1)],
)
def test_the_host_waits_at_logged_steps_alone(model: str, chosen: str, a_step: int, tmp_path: Path) -> None:
    """Divergence judges a step before the optimizer takes it: one transfer, however many batches make the step."""
    with counting() as counter:

        def turn(on: bool) -> None:
            counter.on = on

        train(tmp_path, model, chosen, turn)
    unlogged = [step for step in range(2, STEPS) if step % LOGGED]
    assert counter.found.total() == a_step * len(unlogged), counter.found


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_so_it_does_on_a_gpu(model: str, tmp_path: Path) -> None:
    if model == "moe" and torch.cuda.get_device_capability()[0] not in ONE_KERNEL:
        pytest.skip("F.grouped_mm fetches the ends of the experts' rows on this GPU")

    def turn(on: bool) -> None:
        torch.cuda.set_sync_debug_mode("error" if on else "default")

    try:
        train(tmp_path, model, "all but divergence", turn, accelerator="gpu", devices=1, precision="bf16-mixed")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_counter_sees_every_kind_of_waiting() -> None:
    x = torch.arange(4.0)
    waits = {
        "item": lambda: x[0].item(),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "to": lambda: x.to(device="cpu"),
        "tensor": lambda: torch.tensor([1.0], device=x.device),
        "as_tensor": lambda: torch.as_tensor(1.0, device="cpu"),
        "numpy": lambda: x.numpy(),
        "__bool__": lambda: bool(x[0] > 1),
        "__float__": lambda: float(x[0]),
        "nonzero": lambda: x.nonzero(),
        "index": lambda: x[x > 1],
        "masked_select": lambda: x.masked_select(x > 1),
        "_unique2": lambda: x.unique(),
        "equal": lambda: torch.equal(x, x),
        "repeat_interleave": lambda: x.repeat_interleave(x.long()),
    }
    for how, wait in waits.items():
        with counting() as counter:
            wait()
            assert not counter.found
            counter.on = True
            wait()
            counter.on = False
        assert [name for name, _ in counter.found] == [how]
    with counting() as counter:
        counter.on = True
        x.repeat_interleave(torch.tensor([1, 1, 1, 1]), output_size=4).index_select(0, torch.tensor([1])).sum()
        torch.full((), 1.0, device=x.device).to(x.device, torch.float64)
        counter.on = False
    assert isinstance(counter, Counting)
    assert not counter.found
