"""Which backend computes the experts, and what keeps one from it."""

from typing import Any

import pytest
import torch

from core.errors import ConfigError
from lightning_modules.layers import megablocks
from lightning_modules.layers.experts import Backend, choose_backend
from tests.conftest import make_module, tiny_config


def test_a_backend_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(backend: str, inner_norm: bool = False, **model: Any) -> Backend:
        return choose_backend(tiny_config(ffn="moe", moe={"backend": backend, "expert_dim": 32}, **model), inner_norm)

    assert choose("auto") == ("loop", "no CUDA device")
    with pytest.raises(ConfigError, match=r"model\.moe\.backend='looop'.*auto, grouped, loop, mega.*mean loop"):
        choose("looop")
    with pytest.raises(ConfigError, match=r"megablocks needs a CUDA device; docs/megablocks\.md"):
        choose("megablocks")
    with pytest.raises(ConfigError, match=r"grouped needs widths in multiples of 8, not \(36, 32\)"):
        choose("grouped", dim=36, num_heads=2)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"cannot be imported \(No module named 'grouped_gemm'\); docs/mega"):
        choose("megablocks")
    assert choose("auto").name == "grouped"
    assert "grouped_gemm" in choose("auto").reason
    assert choose("auto", dim=36, num_heads=2).name == "loop"

    monkeypatch.setattr(megablocks, "obstacle", lambda config: None)  # as if it were installed
    assert choose("auto") == ("grouped", "megablocks needs bf16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with torch.autocast("cuda", torch.bfloat16):
        assert choose("auto").name == "megablocks"
        assert choose("auto", inner_norm=True).name == "grouped"
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    assert choose("auto").name == "megablocks"


def test_a_model_says_once_what_computes_its_experts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    make_module(ffn="moe")
    assert caplog.messages == ["MoE backend: loop (no CUDA device)"]
    make_module(ffn="dense")
    assert len(caplog.messages) == 1
