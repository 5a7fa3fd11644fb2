"""The top eigenvalue against the whole Hessian of a tiny model, row by row."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from callbacks.monitors.curvature import Curvature, top_eigenvalue
from core.errors import ConfigError
from lightning_modules.language_module import LanguageModule
from lightning_modules.transformer import Transformer
from tests.support.fitting import Recorder, loader, make_trainer
from tests.support.models import tiny_values, tokens

VOCAB_SIZE = 5


def hessian(model: Transformer, batch: Tensor) -> Tensor:
    parameters = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits, _ = model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = []
    for entry in gradient:
        row = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in row]))
    return torch.stack(rows)


class Held(L.LightningDataModule):
    """One batch to train on, and another for validation."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = [tokens(2, 7) % VOCAB_SIZE, tokens(3, 7) % VOCAB_SIZE]

    def train_dataloader(self) -> Any:
        return loader(self.batches[0], self.batches[0])

    def val_dataloader(self) -> Any:
        return loader(self.batches[1])


def make_module(**fields: Any) -> LanguageModule:
    values = tiny_values(dim=4, num_heads=1, num_layers=1, ffn_dim=4, moe={"expert_dim": 4, "num_experts": 2}, **fields)
    module = LanguageModule(values, {}, VOCAB_SIZE)
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


def test_checkpointed_activations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.curvature='Curvature' is not valid: it cannot see through"):
        train(tmp_path, make_module(activation_checkpointing=True), Held())


def test_of_a_parabola_it_is_exact() -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    curvatures = torch.tensor([1.0, -7.0, 2.0], dtype=torch.float64)
    assert top_eigenvalue((curvatures * x**2).sum() / 2, [x], iterations=40).item() == pytest.approx(-7.0)


@pytest.mark.parametrize("field", ["every_n_steps", "sequences", "iterations"])
def test_nothing_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"callbacks\.curvature\.{field}=0 is not valid"):
        Curvature(**{field: 0})
