"""Anatomy during training: what it keeps is what the weights say afterwards, and training does not notice."""

import json
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch import nn

from analysis.anatomy.held_out import held_out
from analysis.anatomy.layer_drop import LayerDrop
from callbacks.monitors.anatomy import Anatomy
from core.checkpoint import load
from core.errors import ConfigError
from core.open_run import open_run
from lightning_modules.language_module import LanguageModule
from tests.support.fitting import loader, make_trainer
from tests.support.models import make_module, tiny_values, tokens
from tests.support.runs import TinyData, run, scalars
from tools.curves import read_curves

JOB = ["trainer.max_steps=5", "model.placement=spannorm", "callbacks.text_sample=null"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same job without the callback and with it."""
    cwd = tmp_path_factory.mktemp("runs")
    with_it = ["+callbacks=anatomy", "callbacks.anatomy.every_n_steps=2", "callbacks.anatomy.tokens=100"]
    return run(cwd, "plain", *JOB), run(cwd, "watched", *JOB, *with_it)


def test_it_measures_at_first_every_n_steps_and_at_last(runs: tuple[Path, Path]) -> None:
    steps = sorted(int(path.stem) for path in (runs[1] / "anatomy/steps").iterdir())
    assert steps == [0, 2, 4, 5]


def test_what_is_kept_is_of_the_weights_of_that_step(runs: tuple[Path, Path]) -> None:
    opened = open_run(runs[1])
    found = LayerDrop()(opened.module.model, held_out(opened.datamodule, opened.module, 100))
    kept = json.loads((runs[1] / "anatomy/steps/5.json").read_text())
    assert kept["step"] == opened.step == 5
    assert set(kept["findings"]) == {"layer_drop", "contribution", "similarity", "lens"}
    values = kept["findings"]["layer_drop"]["curves"]["drop_by_block"]["values"]
    assert values == pytest.approx(found.curves["drop_by_block"].values, rel=1e-3, abs=1e-6)
    logged = scalars(runs[1], "anatomy/block_2/drop_by_block")
    assert list(logged) == [0, 1, 3, 4]
    assert logged[4] == pytest.approx(values[1], rel=1e-3, abs=1e-6)
    tags = [tag.split("/") for tag in read_curves(runs[1]) if tag.startswith("anatomy/")]
    of_blocks = {tag[2] for tag in tags if len(tag) == 3}  # what stands over depths is no block's
    named = {"drop", "swap", "contribution", "direction", "block_influence"}
    assert of_blocks == {f"{name}_by_block" for name in named}
    assert scalars(runs[1], "anatomy/loss")[4] == pytest.approx(found.scalars["loss"], abs=1e-4)


def test_one_process_measures(tmp_path: Path) -> None:
    data = TinyData(tmp_path)
    data.prepare_data()
    module = LanguageModule(tiny_values(num_layers=1), {"warmup_steps": 0}, data.vocab_size)
    module.configure_model()
    callback = Anatomy(str(tmp_path / "run"), tokens=32, measures=["layer_drop"])
    trainer: Any = SimpleNamespace(datamodule=data, global_step=0, is_global_zero=False)
    callback.on_train_start(trainer, module)
    callback.on_train_batch_start(trainer, module, None, 0)
    callback.on_train_end(trainer, module)
    assert not (tmp_path / "run").exists()


def test_training_does_not_notice(runs: tuple[Path, Path]) -> None:
    plain, watched = (load(folder / "checkpoints/last.ckpt")["state_dict"] for folder in runs)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert scalars(runs[0], "train/loss") == scalars(runs[1], "train/loss")


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    class Own(L.LightningModule):
        model = nn.Linear(2, 2)

    trainer: Any = SimpleNamespace(datamodule=TinyData(tmp_path), is_global_zero=True)
    with pytest.raises(ConfigError, match=r"callbacks\.anatomy='Anatomy' is not valid: it looks at blocks, as "):
        Anatomy(str(tmp_path)).on_train_start(trainer, Own())


def test_a_trainer_without_a_datamodule_is_refused(tmp_path: Path) -> None:
    callback = Anatomy(str(tmp_path))
    trainer = make_trainer(tmp_path, limit_val_batches=0, callbacks=[callback], logger=False, max_steps=1)
    with pytest.raises(ConfigError, match=r"callbacks\.anatomy='Anatomy' is not valid: it takes held-out data from a"):
        trainer.fit(make_module(), loader(tokens(2, 7)), loader(tokens(2, 7)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch looks at it while it traces
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own inductor still imports it
def test_what_is_compiled_is_measured_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph is made of what is measured, inside of which no hook would see anything; training makes its own."""
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    data = TinyData(tmp_path)
    data.prepare_data()
    torch.manual_seed(0)
    module = LanguageModule(tiny_values(compile=True, num_layers=1, placement="prenorm"), {}, data.vocab_size)
    module.configure_model()
    callback = Anatomy(str(tmp_path), every_n_steps=1, tokens=32, measures=["outliers"])
    trainer: Any = SimpleNamespace(
        datamodule=data,
        global_step=0,
        is_global_zero=True,
        precision_plugin=Precision(),
        world_size=1,
        callback_metrics={},
        callbacks=[],
        loggers=[],
    )
    callback.on_train_start(trainer, module)
    callback.on_train_batch_start(trainer, module, None, 0)
    assert (tmp_path / "anatomy/steps/0.json").exists()
    assert not graphs
    module.model(next(iter(held_out(data, module, 32))).rows["tokens"][:, :-1])  # type: ignore[misc]
    assert graphs


def test_accumulated_batches_are_measured_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = TinyData(tmp_path)
    module = LanguageModule(tiny_values(num_layers=1), {"warmup_steps": 0}, data.vocab_size)
    callback = Anatomy(str(tmp_path), every_n_steps=2, tokens=32, measures=["layer_drop"])
    measured: list[float] = []
    called = LayerDrop.__call__

    def count(self: LayerDrop, model: Any, text: Any) -> Any:
        measured.append(model.head.weight.sum().item())
        return called(self, model, text)

    monkeypatch.setattr(LayerDrop, "__call__", count)
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "max_steps": 4, "limit_val_batches": 0, "logger": False}
    make_trainer(tmp_path, callbacks=[callback], **options).fit(module, datamodule=data)
    assert sorted(int(path.stem) for path in (tmp_path / "anatomy/steps").iterdir()) == [0, 2, 4]
    assert len(measured) == len(set(measured)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, r"callbacks\.anatomy\.every_n_steps=0 is not valid: expected an integer >= 1"),
        ({"tokens": 0}, r"callbacks\.anatomy\.tokens=0 is not valid"),
        ({"measures": ["layer_drip"]}, r"callbacks\.anatomy\.measures='layer_drip' is not valid: .*mean layer_drop"),
        ({"measures": ["tuned_lens"]}, r"callbacks\.anatomy\.measures='tuned_lens' is not valid: .*not slow"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Anatomy("run", **arguments)  # type: ignore[arg-type]
