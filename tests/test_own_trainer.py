"""LanguageModule under a Trainer of one's own: the schedule follows its length, however given, and the data go on."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.checkpointing.last_checkpoint import LastCheckpoint
from callbacks.console.dashboard import Dashboard
from callbacks.console.hyperparameters import Hyperparameters
from callbacks.console.progress import StepProgress
from callbacks.console.run_status import RunStatus
from callbacks.console.run_summary import RunSummary
from callbacks.console.text_sample import TextSample
from callbacks.divergence.divergence import Divergence
from callbacks.divergence.flight_recorder import FlightRecorder
from callbacks.monitors.gradient_health import GradientHealth
from callbacks.monitors.representation_collapse import RepresentationCollapse
from callbacks.monitors.signal_propagation import SignalPropagation
from callbacks.monitors.throughput import Throughput
from core.errors import ConfigError
from core.status import read
from lightning_modules.language_module import LanguageModule
from lightning_modules.optim import make_schedule
from tests.support.fitting import Recorder, loader, make_trainer
from tests.support.models import make_module, tiny_values, tokens
from tests.support.runs import DESCRIPTION, TinyData

LENGTHS: dict[str, tuple[dict[str, Any], int]] = {  # of batches of a Trainer, and the steps that it makes of 6 batches
    "steps": ({"max_steps": 5}, 5),
    "an epoch": ({"max_epochs": 1}, 6),
    "epochs": ({"max_epochs": 2}, 12),
    "epochs of accumulated batches, the last of them fewer": ({"max_epochs": 2, "accumulate_grad_batches": 4}, 4),
    "epochs cut short": ({"max_epochs": 2, "limit_train_batches": 3}, 6),
    "the shorter of both": ({"max_epochs": 2, "max_steps": 7}, 7),
    "epochs under a scheduler of accumulation": ({"max_epochs": 2, "scheduling": {0: 3, 1: 2}}, 5),
}


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("name", LENGTHS)
def test_the_schedule_ends_where_the_trainer_does(name: str, schedule: str, tmp_path: Path) -> None:
    options, steps = LENGTHS[name]
    scheduling = [GradientAccumulationScheduler(options["scheduling"])] if "scheduling" in options else []
    rest = {key: value for key, value in options.items() if key != "scheduling"}
    optim = {"lr": 1e-3, "warmup_steps": 2, "schedule": schedule, "decay_fraction": 0.4}
    module, recorder = make_module(optim), Recorder()
    trainer = make_trainer(tmp_path, limit_val_batches=0, logger=recorder, callbacks=scheduling, **rest)
    trainer.fit(module, loader(*[tokens(2, 9)] * 6), loader(tokens(2, 9)))
    assert trainer.global_step == steps
    expected = [1e-3 * make_schedule(module.optim_config, steps)(step) for step in range(steps)]
    assert recorder.series("optim/lr") == pytest.approx(expected)
    assert min(expected[2:]) < 0.6e-3 < max(expected), "it does decay"


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_run_of_no_known_length_is_refused(schedule: str, tmp_path: Path) -> None:
    module = make_module({"schedule": schedule})
    trainer = make_trainer(tmp_path, limit_val_batches=0, logger=False, max_epochs=-1, max_time="00:00:00:01")
    with pytest.raises(
        ConfigError, match=f"trainer.max_steps=-1 .* optim.schedule={schedule} goes by the run's length"
    ):
        trainer.fit(module, loader(tokens(2, 9)), loader(tokens(2, 9)))


def test_a_run_of_no_known_length_may_have_a_constant_rate(tmp_path: Path) -> None:
    module = make_module({"schedule": "constant"})
    trainer = make_trainer(tmp_path, limit_val_batches=0, logger=False, max_epochs=-1, max_time="00:00:00:01")
    trainer.fit(module, loader(*[tokens(2, 9)] * 3), loader(tokens(2, 9)))
    assert trainer.global_step >= 1


class Batches(L.Callback):
    """Keeps what was trained on, and the rate of each step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.seen.append(batch["tokens"].clone())

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def fit(root: Path, *callbacks: L.Callback, ckpt_path: Path | None = None, **options: Any) -> tuple[L.Trainer, Batches]:
    batches = Batches()
    trainer = make_trainer(root, logger=False, callbacks=[*callbacks, batches], **{"limit_val_batches": 0, **options})
    module = LanguageModule(tiny_values(), {"warmup_steps": 1}, DESCRIPTION["vocab_size"])
    trainer.fit(module, datamodule=TinyData(root), ckpt_path=ckpt_path, weights_only=True)
    return trainer, batches


def test_each_epoch_of_the_endless_stream_goes_on_where_the_one_before_ended(tmp_path: Path) -> None:
    _, whole = fit(tmp_path, max_steps=6)
    trainer, epochs = fit(tmp_path, max_epochs=3, limit_train_batches=2)
    assert trainer.global_step == 6
    assert [batch.tolist() for batch in epochs.seen] == [batch.tolist() for batch in whole.seen]
    assert epochs.rates == whole.rates


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")  # the position is ours
def test_epochs_of_the_endless_stream_resume(tmp_path: Path) -> None:
    lengths = {"max_epochs": 3, "limit_train_batches": 2, "enable_checkpointing": True}
    _, whole = fit(tmp_path, LastCheckpoint(str(tmp_path), 3), **lengths)
    resumed, rest = fit(tmp_path, ckpt_path=tmp_path / "previous.ckpt", **lengths)  # amid the second epoch
    assert resumed.global_step == 6
    assert rest.rates == whole.rates[3:]
    assert [batch.tolist() for batch in rest.seen] == [batch.tolist() for batch in whole.seen[3:]]


def test_an_endless_stream_needs_an_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer.max_steps=-1 .* goes by the run's length"):
        fit(tmp_path, max_epochs=2)


def test_accumulation_by_a_scheduler_goes_on_after_a_stop_amid_an_epoch(tmp_path: Path) -> None:
    last = LastCheckpoint(str(tmp_path), 3)
    _, whole = fit(tmp_path, GradientAccumulationScheduler({0: 2}), last, max_steps=5, enable_checkpointing=True)
    stopped = tmp_path / "previous.ckpt"  # of step 3
    resumed, rest = fit(tmp_path, GradientAccumulationScheduler({0: 2}), max_steps=5, ckpt_path=stopped)
    assert resumed.accumulate_grad_batches == 2, "Lightning's loop would go on with 1"
    assert rest.rates == whole.rates[3:]
    assert [batch.tolist() for batch in rest.seen] == [batch.tolist() for batch in whole.seen[6:]]


@pytest.mark.parametrize(
    ("scheduling", "limit", "epochs"),
    [({0: 2, 1: 1}, 2, 2), ({0: 1, 1: 2}, 2, 3), ({0: 1, 1: 3, 2: 2}, 4, 3), ({0: 2}, 3, 2)],
    ids=str,
)
def test_epochs_of_other_steps_leave_out_no_data_and_repeat_none(
    scheduling: dict[int, int], limit: int, epochs: int, tmp_path: Path
) -> None:
    """The position in the stream is counted in batches, also where steps differ, or an epoch ends with a short one."""
    _, plain = fit(tmp_path, max_steps=limit * epochs)
    accumulation = GradientAccumulationScheduler(scheduling)
    _, found = fit(tmp_path, accumulation, max_epochs=epochs, limit_train_batches=limit)
    assert [batch.tolist() for batch in found.seen] == [batch.tolist() for batch in plain.seen]


def test_our_callbacks_know_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that go by trainer.max_steps, which is -1: last.ckpt would end the run with its first step."""
    own = [LastCheckpoint(str(tmp_path / "checkpoints"), 2), RunStatus(str(tmp_path)), StepProgress(line_seconds=0.0)]
    trainer, _ = fit(
        tmp_path,
        *own,
        RunSummary(str(tmp_path)),
        max_epochs=2,
        limit_train_batches=2,
        enable_checkpointing=True,
        enable_progress_bar=True,
    )
    assert trainer.global_step == 4
    status = read(tmp_path)
    assert (status["status"], status["step"], status.get("max_steps"), status.get("reason")) == ("done", 4, None, None)
    assert "step 3/4" in capsys.readouterr().out
    assert (tmp_path / "checkpoints/last.ckpt").is_file()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["resume"]) == (4, None), "no command line makes a Trainer of one's own"


def test_a_summary_does_without_a_datamodule(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[RunSummary(str(tmp_path))], logger=False, max_epochs=1)
    trainer.fit(make_module(), loader(tokens(2, 9)), loader(tokens(2, 9)))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["val_loss"] == pytest.approx(3.9, abs=1)  # ln 50
    assert (summary["steps"], summary["bigram_loss"], summary["val_bits_per_byte"]) == (1, None, None)


@pytest.mark.parametrize(
    "callback",
    [
        LearningRateFinder(),
        BatchSizeFinder(),
        StochasticWeightAveraging(1e-3),
        GradientAccumulationScheduler({0: 2, 4: 8}),
    ],
)
def test_callbacks_that_a_single_epoch_cannot_have_are_refused(callback: L.Callback, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^callbacks.*({type(callback).__name__}|scheduling)"):
        fit(tmp_path, callback, max_steps=3)


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_epochs_of_ones_own_may_be_averaged_and_accumulated(tmp_path: Path) -> None:
    averaging, scheduling = StochasticWeightAveraging(1e-3, 1), GradientAccumulationScheduler({0: 1, 1: 2})
    trainer, _ = fit(tmp_path, averaging, scheduling, max_epochs=3, limit_train_batches=2)
    assert trainer.global_step == 4


class Plain(L.LightningDataModule):
    """One of anybody's: a DataLoader with a length, and no position."""

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.tokens = tokens(8, 9)

    def train_dataloader(self) -> Any:
        return DataLoader([{"tokens": row} for row in self.tokens], batch_size=self.batch_size)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = train_dataloader


@pytest.mark.parametrize("loaders", [False, True])
def test_our_callbacks_take_any_data(loaders: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that ask a DataModule of ours for its position, tokenizer or fields do without."""
    monitors = [Throughput(), GradientHealth(), SignalPropagation(1), RepresentationCollapse(1)]
    console = [
        Dashboard(),
        Hyperparameters(),
        TextSample("def ", 4),
        RunSummary(str(tmp_path)),
        RunStatus(str(tmp_path)),
    ]
    recovery = [
        LastCheckpoint(str(tmp_path / "checkpoints"), 2),
        FlightRecorder(str(tmp_path)),
        Divergence(str(tmp_path)),
    ]
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(
        tmp_path, callbacks=[*monitors, *console, *recovery], logger=logger, max_epochs=2, enable_checkpointing=True
    )
    data, module = Plain(), make_module()
    given = {"train_dataloaders": data.train_dataloader(), "val_dataloaders": data.val_dataloader()}
    trainer.fit(module, **(given if loaders else {"datamodule": data}))
    assert trainer.global_step == 8
    assert "No text sample: callbacks.text_sample.prompt='def ' is not valid: expected data with a tok" in (
        capsys.readouterr().out
    )
    assert json.loads((tmp_path / "summary.json").read_text())["tokens"] == 2 * 8 * 8
    (metrics,) = trainer.test(module, **({"dataloaders": data.test_dataloader()} if loaders else {"datamodule": data}))
    assert metrics["test/loss"] == pytest.approx(math.log(metrics["test/perplexity"]), rel=1e-5)
