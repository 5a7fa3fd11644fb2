"""What monitors measure can be asked for by the callbacks of others, in every process alike."""

import datetime
import json
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from callbacks.monitors.gradient_health import GradientHealth
from callbacks.monitors.signal_propagation import SignalPropagation
from lightning_modules.language_module import LanguageModule
from tests.support.fitting import fit
from tests.support.models import VOCAB_SIZE, tiny_values, tokens
from tests.support.processes import together
from tests.support.runs import scalars, tiny_job, train

LIGHTNING = "lightning.pytorch.callbacks"
LONG = ("trainer.max_steps=40", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "run_dir=run")


@pytest.mark.parametrize(
    "monitor", ["gradients/first_over_last", "signal/block_1/variance", "updates/block_1/attn_in", "moe/max_load"]
)
def test_early_stopping_by_a_monitors_value(monitor: str, tmp_path: Path) -> None:
    stopping = (
        f"+callbacks.stop={{_target_: {LIGHTNING}.EarlyStopping, monitor: {monitor}, patience: 1, min_delta: 1e9}}"
    )
    finished = train(tmp_path, *tiny_job("model=moe", *LONG, stopping))
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (finished.code, status["status"], status["step"]) == (0, "stopped", 4), finished.err
    assert status["reason"].startswith(f"EarlyStopping: Monitored metric {monitor} did not improve")


def test_the_checkpoint_with_the_best_value_of_a_monitor_is_kept(tmp_path: Path) -> None:
    name = "'{step}_{gradients/first_over_last:.6f}'"
    keeps = f"_target_: {LIGHTNING}.ModelCheckpoint, dirpath: run/mine, monitor: gradients/first_over_last"
    mine = f"+callbacks.mine={{{keeps}, filename: {name}, auto_insert_metric_name: false, mode: max}}"
    assert train(tmp_path, *tiny_job(*LONG, "trainer.max_steps=6", mine)).code == 0
    logged = scalars(tmp_path / "run", "gradients/first_over_last")
    best = max((step for step in (1, 3, 5)), key=logged.__getitem__)  # validated behind these, counted from 0
    assert [path.name for path in (tmp_path / "run/mine").iterdir()] == [f"{best + 1}_{logged[best]:.6f}.ckpt"]


class Seen(Callback):
    """Keeps what a callback of one's own sees."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def on_train_end(self, trainer: object, pl_module: object) -> None:
        self.values = {name: float(value) for name, value in trainer.callback_metrics.items()}  # type: ignore[attr-defined]


def seen_in(folder: Path, _: None) -> dict[str, float]:
    """What a callback sees in one of two processes."""
    torch.manual_seed(int(os.environ["LOCAL_RANK"]))  # each has texts of its own
    batches = [tokens(2, 9) for _ in range(2)]
    torch.manual_seed(0)
    module, seen = LanguageModule(tiny_values(ffn="dense"), {"warmup_steps": 0}, VOCAB_SIZE), Seen()
    two = DDPStrategy(process_group_backend="gloo", timeout=datetime.timedelta(seconds=60))
    callbacks = [GradientHealth(), SignalPropagation(every_n_steps=1), seen]
    fit(folder, module, *batches, callbacks=callbacks, max_steps=2, logger=False, strategy=two, devices=2)
    return seen.values


def test_every_process_sees_what_the_first_has_measured(tmp_path: Path) -> None:
    (first,), (second,) = together(2, tmp_path, seen_in, [None])
    monitored = {name for name in first if name.startswith(("signal/", "gradients/"))}
    assert {"signal/block_1/variance", "gradients/first_over_last"} <= monitored
    assert {name: first[name] for name in monitored} == {name: second[name] for name in monitored}
