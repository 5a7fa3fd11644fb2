"""Each norm kind against its formula."""

import numpy as np
import pytest
import torch

from core.errors import ConfigError
from lightning_modules.layers.norms import make_norm
from tests.conftest import tiny_config

EPS = 0.1  # large enough to show


def formula(kind: str, x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    if kind == "rmsnorm":
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * p["weight"]
    if kind == "layernorm":
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPS) * p["weight"] + p["bias"]
    if kind == "dyt":
        return p["weight"] * np.tanh(p["alpha"] * x) + p["bias"]
    return x


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "dyt", "none"])
def test_norm_is_its_formula(kind: str) -> None:
    norm = make_norm(tiny_config(norm=kind, norm_eps=EPS), dim=12)
    x = 2 * torch.randn(3, 5, 12) + 1
    for randomized in (False, True):
        if randomized:
            for parameter in norm.parameters():
                torch.nn.init.normal_(parameter)
        parameters = {name: parameter.detach().numpy() for name, parameter in norm.named_parameters()}
        expected = formula(kind, x.numpy(), parameters)
        np.testing.assert_allclose(norm(x).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "start"), [("rmsnorm", {"weight": 1}), ("layernorm", {"weight": 1, "bias": 0})])
def test_gains_start_at_one_and_biases_at_zero(kind: str, start: dict[str, float]) -> None:
    norm = make_norm(tiny_config(norm=kind), dim=12)
    assert {name: set(parameter.tolist()) for name, parameter in norm.named_parameters()} == {
        name: {value} for name, value in start.items()
    }


def test_dyt_starts_as_half_steep_tanh() -> None:
    x = torch.randn(4, 12)
    torch.testing.assert_close(make_norm(tiny_config(norm="dyt"), 12)(x), torch.tanh(x / 2))


def test_unknown_kind() -> None:
    with pytest.raises(ConfigError, match=r"model\.norm='rmsnrm'.*dyt, layernorm, none, rmsnorm.*mean rmsnorm"):
        make_norm(tiny_config(norm="rmsnrm"), dim=12)


@pytest.mark.parametrize("kind", ["rmsnorm", "dyt", "none"])  # layernorm's result is autocast's to choose
def test_bf16_stays_bf16_and_is_computed_in_fp32(kind: str) -> None:
    norm, x = make_norm(tiny_config(norm=kind), dim=12), torch.randn(4, 12, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    torch.testing.assert_close(out, norm(x.float()).bfloat16(), rtol=0, atol=0)
