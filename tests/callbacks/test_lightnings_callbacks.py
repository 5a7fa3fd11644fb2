"""README promises any Lightning callback: all of Lightning's own, with a dense model and with a mixture of experts."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as theirs
import pytest
import torch

from tests.support.runs import Finished, load, tiny_job, train

ARGUMENTS = {
    "DeviceStatsMonitor": "cpu_stats: true",
    "EMAWeightAveraging": "decay: 0.5",
    "EarlyStopping": "monitor: val/loss",
    "GradientAccumulationScheduler": "scheduling: {0: 2}",
    "LambdaCallback": "",
    "LearningRateMonitor": "",
    "ModelCheckpoint": "every_n_train_steps: 1, save_top_k: -1, dirpath: more",
    "ModelPruning": "pruning_fn: l1_unstructured, amount: 0.5, prune_on_train_epoch_end: false",
    "ModelSummary": "max_depth: 3",
    "OnExceptionCheckpoint": "dirpath: broken",
    "RichModelSummary": "max_depth: 3",
    "RichProgressBar": "",
    "SpikeDetection": "",
    "TQDMProgressBar": "",
    "Timer": "duration: '00:01:00:00'",
    "WeightAveraging": "",
}
"""What each needs to be given on the command line."""

SUBCLASSES = {
    "BaseFinetuning": """
    def freeze_before_training(self, module):
        self.freeze(module.model.embedding)

    def finetune_function(self, module, epoch, optimizer):
        pass
""",
    "BasePredictionWriter": """
    def __init__(self):
        super().__init__("epoch")
""",
    "Callback": """
    def on_train_start(self, trainer, module):
        assert module.model is not None
""",
    "Checkpoint": "",
    "ProgressBar": "",
    "ThroughputMonitor": """
    def __init__(self):
        super().__init__(batch_size_fn=lambda batch: len(batch["tokens"]))
""",
}
"""Those that are there to be derived from, or take functions: a user writes a file."""

REFUSED = {"BackboneFinetuning", "BatchSizeFinder", "LearningRateFinder", "StochasticWeightAveraging"}
"""Those that would make another run of it than the configuration says, or have nothing to do with such a model."""


CHANGING = ("BaseFinetuning", "EMAWeightAveraging", "GradientAccumulationScheduler", "ModelPruning", "WeightAveraging")
"""Those that take hold of the weights or the steps; all others only look."""


def with_callbacks(tmp_path: Path, names: Iterable[str], *arguments: str) -> Finished:
    given = []
    for name in names:
        target, options = f"lightning.pytorch.callbacks.{name}", ARGUMENTS.get(name, "")
        if name in SUBCLASSES:
            target = f"mine_{name.lower()}.Mine"
            body = SUBCLASSES[name] or "    pass"
            text = f"from lightning.pytorch.callbacks import {name}\n\n\nclass Mine({name}):\n{body}"
            (tmp_path / f"mine_{name.lower()}.py").write_text(text)
        given.append(f"+callbacks.their_{name}={{_target_: {target}{', ' if options else ''}{options}}}")
        given += ["callbacks.progress=null"] if "ProgressBar" in name else []
    steps = ("trainer.max_steps=4", "trainer.val_check_interval=2", "run_dir=run")
    return train(tmp_path, *tiny_job(*steps, *arguments, *given))


def assert_trained(tmp_path: Path, names: Iterable[str], model: str) -> dict[str, Any]:
    """It trains to the end; returns the final weights."""
    finished = with_callbacks(tmp_path, names, f"model={model}")
    assert finished.code == 0, finished.err
    checkpoint = load(tmp_path / "run/checkpoints/last.ckpt")
    assert checkpoint["global_step"] == 4
    assert all(w.isfinite().all() for w in checkpoint["state_dict"].values() if isinstance(w, torch.Tensor))
    return checkpoint["state_dict"]


def test_all_of_them_are_tried() -> None:
    assert {*ARGUMENTS, *SUBCLASSES, *REFUSED} == set(theirs.__all__)


noisy = pytest.mark.filterwarnings("ignore::UserWarning")  # each has something to say about the machine or the logger
models = pytest.mark.parametrize("model", ["dense", "moe"])


@noisy
@models
@pytest.mark.parametrize("name", ["GradientAccumulationScheduler", "WeightAveraging"])
def test_one_that_takes_hold_of_the_run_goes_with_it(name: str, model: str, tmp_path: Path) -> None:
    assert_trained(tmp_path, [name], model)


@noisy
@models
def test_those_that_look_go_together(model: str, tmp_path: Path) -> None:
    bars = {"ProgressBar", "TQDMProgressBar"}  # a Trainer takes one
    assert_trained(tmp_path, [name for name in (*ARGUMENTS, *SUBCLASSES) if name not in {*CHANGING, *bars}], model)


@noisy
@models
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in (*ARGUMENTS, *SUBCLASSES) if name not in CHANGING])
def test_each_goes_with_a_run(name: str, model: str, tmp_path: Path) -> None:
    assert_trained(tmp_path, [name], model)


def test_pruning_that_would_come_too_late_is_refused(tmp_path: Path) -> None:
    late = "+callbacks.prune={_target_: lightning.pytorch.callbacks.ModelPruning, pruning_fn: l1_unstructured}"
    finished = train(tmp_path, *tiny_job("run_dir=run", late))
    assert finished.code == 2
    assert "the run is a single epoch" in finished.err
    assert not (tmp_path / "run").exists()


def test_a_backbone_is_not_looked_for(tmp_path: Path) -> None:
    finished = with_callbacks(tmp_path, ["BackboneFinetuning"], "model=moe")
    assert finished.code == 2
    assert "callbacks='BackboneFinetuning' is not valid: no part of the model is a backbone" in finished.err
    assert not (tmp_path / "run").exists()


@noisy
@models
def test_weights_are_frozen_averaged_and_pruned(model: str, tmp_path: Path) -> None:
    states: dict[str, Any] = {}
    for name in ("Callback", "BaseFinetuning", "EMAWeightAveraging", "ModelPruning"):
        (tmp_path / name).mkdir()
        states[name] = assert_trained(tmp_path / name, [name], model)
    plain = states["Callback"]
    embedding, head = "model.embedding.weight", "model.head.weight"
    assert not torch.equal(states["BaseFinetuning"][embedding], plain[embedding])
    assert not torch.equal(states["EMAWeightAveraging"][head], plain[head])
    matrices = [w for name, w in states["ModelPruning"].items() if w.dim() == 2 and "mlp" not in name]
    zeros = sum((w == 0).sum().item() for w in matrices) / sum(w.numel() for w in matrices)
    assert 0.5 < zeros < 0.8, "half of it, twice"
