"""model.cpu_kernels: what it exchanges, what stays, and that the results agree."""

from typing import Any

import pytest
import torch
import yaml
from torch import nn

from core.errors import ConfigError
from lightning_modules import transformer_module
from lightning_modules.config import ModelConfig, parse
from lightning_modules.layers.cpu_kernels import KERNELS, linear, use_cpu_kernels
from lightning_modules.transformer import Transformer
from tests.support.models import make_module, tiny_config, tokens


def classes(model: nn.Module) -> set[type]:
    return {type(part) for part in model.modules()}


def built(ffn: str, **overrides: Any) -> Transformer:
    torch.manual_seed(0)
    model = make_module(ffn=ffn, **overrides).model
    assert model is not None
    return model


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_off_leaves_every_layer_plain_and_auto_only_changes_classes(ffn: str) -> None:
    plain, fast = built(ffn, cpu_kernels="off"), built(ffn)
    assert not classes(plain) & set(KERNELS.values())
    expected = {KERNELS.get(cls, cls) for cls in classes(plain)}
    assert classes(fast) == expected
    assert any(cls in KERNELS for cls in classes(plain))
    assert list(plain.state_dict()) == list(fast.state_dict())


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_both_compute_the_same(ffn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MIN_MULTIPLICATIONS", 0)
    plain, fast = built(ffn, cpu_kernels="off"), built(ffn)
    fast.load_state_dict(plain.state_dict())
    batch, results = tokens(2, 9), []
    for model in (plain, fast):
        for parameter in model.parameters():
            parameter.grad = None
        losses, _ = model(batch[:, :-1], targets=batch[:, 1:])
        losses.mean.backward()
        results.append((losses.mean.detach(), [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_a_subclass_of_a_layer_stays_as_it_is() -> None:
    class Mine(nn.Linear):
        pass

    module = nn.Sequential(Mine(2, 2), nn.Linear(2, 2))
    use_cpu_kernels(module)
    assert type(module[0]) is Mine
    assert type(module[1]) is KERNELS[nn.Linear]
    x = torch.randn(3, 2)
    torch.testing.assert_close(module[1](x), x @ module[1].weight.mT + module[1].bias)


def test_memory_is_kept_with_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(transformer_module, "keep_freed_memory", lambda: calls.append(1))
    make_module(cpu_kernels="off")
    assert not calls
    make_module()
    assert calls == [1]


def test_another_value_is_refused() -> None:
    assert parse(ModelConfig, "model", yaml.safe_load("cpu_kernels: off")).cpu_kernels == "off"
    with pytest.raises(ConfigError, match=r"model\.cpu_kernels='on' is not valid: expected one of auto, off"):
        tiny_config(cpu_kernels="on")
