"""README promises any Lightning callback: all of Lightning's own, with a dense model and with a mixture of experts."""

from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as theirs
import pytest
import torch

from tests.helpers_run import Finished, load, tiny_job, train

ARGUMENTS = {
    "DeviceStatsMonitor": "cpu_stats: true",
    "EMAWeightAveraging": "decay: 0.5",
    "EarlyStopping": "monitor: val/loss",
    "GradientAccumulationScheduler": "scheduling: {0: 2}",
    "LambdaCallback": "",
    "LearningRateMonitor": "",
    "ModelCheckpoint": "every_n_train_steps: 1, save_top_k: -1, dirpath: more",
    "ModelPruning": "pruning_fn: l1_unstructured, amount: 0.5",
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


def with_callback(tmp_path: Path, name: str, *arguments: str) -> Finished:
    target, given = f"lightning.pytorch.callbacks.{name}", ARGUMENTS.get(name, "")
    if name in SUBCLASSES:
        target = f"mine_{name.lower()}.Mine"
        body = SUBCLASSES[name] or "    pass"
        text = f"from lightning.pytorch.callbacks import {name}\n\n\nclass Mine({name}):\n{body}"
        (tmp_path / f"mine_{name.lower()}.py").write_text(text)
    theirs = f"+callbacks.theirs={{_target_: {target}{', ' if given else ''}{given}}}"
    bar = ["callbacks.progress=null"] if "ProgressBar" in name else []
    steps = ("trainer.max_steps=4", "trainer.val_check_interval=2", "run_dir=run")
    return train(tmp_path, *tiny_job(*steps, *arguments, theirs, *bar))


def test_all_of_them_are_tried() -> None:
    assert {*ARGUMENTS, *SUBCLASSES, *REFUSED} == set(theirs.__all__)


@pytest.mark.filterwarnings("ignore::UserWarning")  # each has something to say about the machine or the logger
@pytest.mark.parametrize("name", [*ARGUMENTS, *SUBCLASSES])
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_it_goes_with_a_run(model: str, name: str, tmp_path: Path) -> None:
    finished = with_callback(tmp_path, name, f"model={model}")
    assert finished.code == 0, finished.err
    checkpoint = load(tmp_path / "run/checkpoints/last.ckpt")
    assert checkpoint["global_step"] == 4
    assert all(w.isfinite().all() for w in checkpoint["state_dict"].values() if isinstance(w, torch.Tensor))


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_backbone_is_not_looked_for(model: str, tmp_path: Path) -> None:
    finished = with_callback(tmp_path, "BackboneFinetuning", f"model={model}")
    assert finished.code == 2
    assert "callbacks='BackboneFinetuning' is not valid: no part of the model is a backbone" in finished.err
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_finetuning_freezes_and_averaging_averages(model: str, tmp_path: Path) -> None:
    weights: dict[str, Any] = {}
    for name in ("Callback", "BaseFinetuning", "EMAWeightAveraging"):
        (tmp_path / name).mkdir()
        assert with_callback(tmp_path / name, name, f"model={model}", "seed=3").code == 0
        weights[name] = load(tmp_path / name / "run/checkpoints/last.ckpt")["state_dict"]
    embeddings = {name: state["model.embedding.weight"] for name, state in weights.items()}
    torch.manual_seed(0)
    assert not torch.equal(embeddings["BaseFinetuning"], embeddings["Callback"])
    assert embeddings["BaseFinetuning"].std().item() == pytest.approx(embeddings["Callback"].std().item(), rel=0.2)
    assert not torch.equal(embeddings["EMAWeightAveraging"], embeddings["Callback"])
