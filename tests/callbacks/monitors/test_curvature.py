"""The top eigenvalue against the whole Hessian of a tiny model, row by row."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.monitors.curvature import Curvature
from core.errors import ConfigError
from lightning_modules.language_module import LanguageModule
from tests.support.curvature import hessian
from tests.support.fitting import Recorder, loader, make_trainer
from tests.support.models import tiny_values, tokens
from tests.support.own_pieces import forget_pieces, write_pieces

VOCAB_SIZE = 5


class Held(L.LightningDataModule):
    """One batch to train on, and another for validation."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = [tokens(2, 7) % VOCAB_SIZE, tokens(3, 7) % VOCAB_SIZE]

    def train_dataloader(self) -> Any:
        return loader(*[self.batches[0]] * 3)

    def val_dataloader(self) -> Any:
        return loader(self.batches[1])


def make_module(optim: dict[str, Any] | None = None, **fields: Any) -> LanguageModule:
    values = tiny_values(dim=4, num_heads=1, num_layers=1, ffn_dim=4, moe={"expert_dim": 4, "num_experts": 2}, **fields)
    module = LanguageModule(values, optim or {}, VOCAB_SIZE)
    module.configure_model()
    return module


def train(root: Path, module: LanguageModule, data: Held) -> Recorder:
    recorder, monitor = Recorder(), Curvature(every_n_steps=10, iterations=200)
    trainer = make_trainer(root, limit_val_batches=0, callbacks=[monitor], logger=recorder, max_steps=2)
    trainer.fit(module, datamodule=data)
    return recorder


@pytest.mark.parametrize("ffn", ["dense", pytest.param("moe", marks=pytest.mark.slow)])
def test_the_top_eigenvalue(tmp_path: Path, ffn: str) -> None:
    module, data = make_module(ffn=ffn), Held()
    assert module.model is not None
    spectrum = torch.linalg.eigvalsh(hessian(module.model, data.batches[1][:2]))
    expected = max(spectrum.tolist(), key=abs)
    recorder = train(tmp_path, module, data)
    assert recorder.series("curvature/top_eigenvalue") == [pytest.approx(expected, rel=1e-3)]


@pytest.mark.parametrize("optimizer", ["muon", "lion", "torch.optim.SGD", "my_optimizer.Signs"])
def test_it_is_of_the_weights_that_the_optimizer_has_made(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the third step, against the Hessian of a copy of the weights after two; and the monitor changes none."""
    forget_pieces()
    write_pieces(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    optim = {"optimizer": optimizer, "lr": 0.05, "warmup_steps": 0, "schedule": "constant"}
    data, recorder, ends = Held(), Recorder(), []
    for steps, callbacks in ((2, []), (3, [Curvature(every_n_steps=3, iterations=60)])):
        torch.manual_seed(1)
        module = make_module(optim)
        trainer = make_trainer(tmp_path, limit_val_batches=0, callbacks=callbacks, logger=recorder, max_steps=steps)
        trainer.fit(module, datamodule=data)
        ends.append(module.model)
    forget_pieces()
    before, _ = ends
    spectrum = torch.linalg.eigvalsh(hessian(before, data.batches[1][:2]))
    first, third = recorder.series("curvature/top_eigenvalue")
    assert third == pytest.approx(max(spectrum.tolist(), key=abs), rel=2e-2)
    assert first != pytest.approx(third, rel=2e-2), "the weights of the first step have another"


def test_a_trainer_without_a_datamodule_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, limit_val_batches=0, callbacks=[Curvature()], logger=False, max_steps=1)
    with pytest.raises(ConfigError, match=r"callbacks\.curvature='Curvature' is not valid: it takes its batch from a"):
        trainer.fit(make_module(), loader(tokens(2, 7) % VOCAB_SIZE), loader(tokens(2, 7) % VOCAB_SIZE))


def test_checkpointed_activations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.curvature='Curvature' is not valid: it cannot see through"):
        train(tmp_path, make_module(activation_checkpointing=True), Held())


@pytest.mark.parametrize("field", ["every_n_steps", "sequences", "iterations"])
def test_nothing_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"callbacks\.curvature\.{field}=0 is not valid"):
        Curvature(**{field: 0})
