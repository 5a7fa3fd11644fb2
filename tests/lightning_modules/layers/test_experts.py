"""Which backend computes the experts, and what keeps one from it; on any machine, with or without a GPU."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from lightning_modules.language_module import LanguageModule
from lightning_modules.layers import megablocks, moe
from lightning_modules.layers.experts import Backend, choose_backend
from tests.support.fitting import fit, make_trainer
from tests.support.models import VOCAB_SIZE, make_module, tiny_config, tiny_values, tokens

META = torch.device("meta")


def choose(backend: str, inner_norm: bool = False, expert_dim: int = 32, **model: Any) -> Backend:
    config = tiny_config(ffn="moe", moe={"backend": backend, "expert_dim": expert_dim}, **model)
    return choose_backend(config, inner_norm)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device, on which models are built; MegaBlocks is not installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    for name in ("grouped_gemm", "megablocks", "megablocks.layers.dmoe"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def installed(with_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And MegaBlocks is."""
    for name in ("grouped_gemm", "megablocks", "megablocks.layers", "megablocks.layers.dmoe"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))


def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)


@pytest.mark.usefixtures("without_gpu")
def test_a_cpu_has_the_loop_and_says_why_nothing_else() -> None:
    assert choose("auto") == ("loop", "runs on cpu")
    assert choose("grouped") == ("grouped", "as configured")
    with pytest.raises(ConfigError, match=r"model\.moe\.backend='looop'.*auto, grouped, loop, mega.*mean loop"):
        choose("looop")
    with pytest.raises(ConfigError, match=r"megablocks needs a CUDA device; docs/megablocks\.md"):
        choose("megablocks")
    with pytest.raises(ConfigError, match=r"grouped needs widths in multiples of 8, not \(36, 32\)"):
        choose("grouped", dim=36, num_heads=2)


@pytest.mark.usefixtures("with_gpu")
def test_a_gpu_without_the_package_has_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16(monkeypatch)
    with pytest.raises(ConfigError, match=r"cannot be imported \(import of grouped_gemm.*\); docs/megablocks\.md"):
        choose("megablocks")
    assert choose("auto").name == "grouped"
    assert "grouped_gemm" in choose("auto").reason
    assert choose("auto", dim=36, num_heads=2) == ("loop", "grouped needs widths in multiples of 8, not (36, 32)")


@pytest.mark.usefixtures("installed")
def test_a_gpu_with_the_package_has_megablocks_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_bf16 = "megablocks computes in bf16 only, not in torch.float32: trainer.precision=bf16-mixed or bf16-true"
    assert choose("auto") == ("grouped", needs_bf16)
    with pytest.raises(ConfigError, match=needs_bf16):
        choose("megablocks")
    with torch.autocast("cuda", torch.bfloat16):
        assert choose("auto") == ("megablocks", "CUDA in bf16")
        assert choose("auto", inner_norm=True).name == "grouped"
    with torch.autocast("cuda", torch.float16):
        assert choose("auto").name == "grouped"
    bf16(monkeypatch)
    assert choose("auto").name == choose("megablocks").name == "megablocks"
    assert choose("megablocks", expert_dim=32).name == "megablocks"  # 4 experts
    with pytest.raises(ConfigError, match=r"needs num_experts x expert_dim >= 128"):
        choose("megablocks", expert_dim=24)


def test_nothing_but_the_loop_computes_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    with pytest.raises(ConfigError, match=r"model\.moe\.backend='grouped' .* grouped does not compute in float64"):
        choose("grouped")
    assert choose("loop").name == "loop"


@pytest.mark.usefixtures("installed")
def test_the_weightless_build_refuses_only_what_no_device_nor_precision_could_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_default_device", lambda: META)
    assert choose("megablocks").name == "megablocks"
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    assert choose("grouped").name == "grouped"
    with pytest.raises(ConfigError, match="multiples of 8"):
        choose("megablocks", dim=36, num_heads=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        choose("megablocks")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16)]
)
def test_the_choice_is_made_for_the_trainers_device_and_precision(
    precision: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def obstacle(config: object, device: torch.device, dtype: torch.dtype | None) -> str:
        seen.append((device.type, dtype))
        return "is not looked for"

    monkeypatch.setattr(megablocks, "obstacle", obstacle)
    module = LanguageModule(tiny_values(ffn="moe"), {}, VOCAB_SIZE)
    assert set(seen) == {("meta", None)}
    seen.clear()
    fit(tmp_path, module, tokens(2, 9), max_steps=1, logger=False, precision=precision)
    assert set(seen) == {("cpu", dtype)}


def test_on_the_cpu_of_a_machine_with_a_gpu_auto_takes_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_such_a_machine(*arguments: Any) -> Backend:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return choose_backend(*arguments)

    monkeypatch.setattr(moe, "choose_backend", on_such_a_machine)
    module = LanguageModule(tiny_values(ffn="moe"), {}, VOCAB_SIZE)
    fit(tmp_path, module, tokens(2, 9), max_steps=1, logger=False)
    assert module.model is not None
    assert {mixture.backend for mixture in module.model.mixtures().values()} == {("loop", "runs on cpu")}


def test_the_trainers_device_counts_and_not_torchs_default_one(tmp_path: Path) -> None:
    module = LanguageModule(tiny_values(ffn="moe"), {}, VOCAB_SIZE)
    module.trainer = make_trainer(tmp_path, logger=False)
    with META:  # Lightning sets its own, but not under a ModelParallelStrategy
        module.configure_model()
    assert module.model is not None
    assert {mixture.backend.reason for mixture in module.model.mixtures().values()} == {"runs on cpu"}


def test_in_float64_grouped_is_refused_before_the_first_step(tmp_path: Path) -> None:
    module = LanguageModule(tiny_values(ffn="moe", moe={"backend": "grouped"}), {}, VOCAB_SIZE)
    with pytest.raises(ConfigError, match="does not compute in float64"):
        fit(tmp_path, module, tokens(2, 9), max_steps=1, logger=False, precision="64-true")


def test_a_model_says_once_what_computes_its_experts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    make_module(ffn="moe")
    assert caplog.messages == ["MoE backend: loop (runs on cpu)"]
    make_module(ffn="dense")
    assert len(caplog.messages) == 1
