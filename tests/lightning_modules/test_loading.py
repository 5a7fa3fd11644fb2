"""LanguageModule.load_from_checkpoint: whatever a checkpoint of ours looks like, as data, from any folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from core.checkpoint import load
from core.errors import ConfigError
from lightning_modules.language_module import LanguageModule
from tests.support.fitting import fit
from tests.support.models import VOCAB_SIZE, make_module, tiny_values, tokens
from tests.support.old_checkpoints import FIXTURES
from tests.support.own_pieces import forget_pieces, write_pieces
from tests.support.runs import run
from tools.consolidate import consolidate


def saved(folder: Path, **overrides: Any) -> tuple[LanguageModule, Path]:
    module = make_module(**overrides)
    trainer = fit(folder, module, tokens(2, 9), tokens(2, 9), max_steps=2, logger=False)
    trainer.save_checkpoint(folder / "a.ckpt")
    return module, folder / "a.ckpt"


def assert_same(found: LanguageModule, module: LanguageModule) -> None:
    expected = module.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(found.state_dict()[name], expected[name]) for name in expected)


@pytest.mark.parametrize("overrides", [{}, {"tie_embeddings": True}, {"ffn": "moe", "moe": {"balancing": "bias"}}])
def test_of_one_file_and_consolidated(
    overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, path = saved(tmp_path, **overrides)
    consolidate(path, tmp_path / "a.safetensors")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for source in ("../a.ckpt", path, tmp_path / "a.safetensors"):
        found = LanguageModule.load_from_checkpoint(source)
        assert_same(found, module)
        assert (found.model_config, found.optim_config) == (module.model_config, module.optim_config)
        assert found.training
        assert next(found.parameters()).requires_grad


def test_of_a_folder_in_pieces() -> None:
    """Of two processes, in the old format; tests/distributed/test_consolidate.py has one of today's."""
    weights = load(FIXTURES / "in_pieces/checkpoints/last.ckpt")["state_dict"]
    for source in (FIXTURES / "in_pieces", FIXTURES / "in_pieces/checkpoints/last.ckpt"):
        found = LanguageModule.load_from_checkpoint(source).state_dict()
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_of_a_run(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", "experiment=dense_spannorm")
    weights = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for source in (folder, folder / "checkpoints/best.ckpt"):
        found = LanguageModule.load_from_checkpoint(source).state_dict()
        assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_it_goes_on_training_and_is_on_the_device_that_is_asked_for(tmp_path: Path) -> None:
    module, path = saved(tmp_path)
    found = LanguageModule.load_from_checkpoint(path, map_location=torch.device("cpu"))
    fit(tmp_path, found, tokens(2, 9), max_steps=1, logger=False)
    assert not torch.equal(found.state_dict()["model.head.weight"], module.state_dict()["model.head.weight"])
    with pytest.raises(ConfigError, match=r"map_location=\{'cuda:0': 'cpu'\} is not valid: expected a device"):
        LanguageModule.load_from_checkpoint(path, map_location={"cuda:0": "cpu"})


def test_given_arguments_take_the_place_of_saved_ones(tmp_path: Path) -> None:
    module, path = saved(tmp_path, rope_theta=5000.0)
    found = LanguageModule.load_from_checkpoint(path, optim={"optimizer": "lion", "lr": 1e-5})
    assert (found.optim_config.optimizer, found.optim_config.lr, found.optim_config.warmup_steps) == ("lion", 1e-5, 100)
    assert found.hparams["optim"] == {"optimizer": "lion", "lr": 1e-5}, "it is what is saved next"
    assert_same(found, module)
    other = LanguageModule.load_from_checkpoint(path, model=tiny_values(rope_theta=7.0))
    assert other.model_config.rope_theta == 7.0
    with pytest.raises(ConfigError, match=r"checkpoint_path='.*a\.ckpt' is not valid: .*(weights|same model)"):
        LanguageModule.load_from_checkpoint(path, model=tiny_values(dim=64))
    with pytest.raises(ConfigError, match=r"optim\.lrr=1 is not valid: no such field"):
        LanguageModule.load_from_checkpoint(path, optim={"lrr": 1})


def test_weights_may_be_missing_where_that_is_said(tmp_path: Path) -> None:
    module, path = saved(tmp_path)
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["model.head.weight"]
    torch.save(content, path)
    with pytest.raises(ConfigError, match=r"a\.ckpt' is not valid: expected a checkpoint with at least .* weights"):
        LanguageModule.load_from_checkpoint(path)
    found = LanguageModule.load_from_checkpoint(path, strict=False)
    assert torch.equal(found.state_dict()["model.embedding.weight"], module.state_dict()["model.embedding.weight"])


def test_a_class_that_is_derived_from_it_gets_its_own_arguments(tmp_path: Path) -> None:
    class Tagged(LanguageModule):
        def __init__(self, model: Any, optim: Any, vocab_size: int, tag: str = "none") -> None:
            super().__init__(model, optim, vocab_size)
            self.tag = tag
            self.loaded = False

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_load_checkpoint(checkpoint)
            self.loaded = "state_dict" in checkpoint

    module = Tagged(tiny_values(), {"warmup_steps": 0}, VOCAB_SIZE, tag="mine")
    trainer = fit(tmp_path, module, tokens(2, 9), max_steps=1, logger=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = Tagged.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (type(found), found.tag, found.loaded) == (Tagged, "mine", True)
    assert type(LanguageModule.load_from_checkpoint(tmp_path / "a.ckpt")) is LanguageModule


class Payload:
    """Leaves a trace where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_the_file_is_run(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "extra": Payload(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    for options in ({}, {"weights_only": True}):
        with pytest.raises(ConfigError, match="cannot be read as one"):
            LanguageModule.load_from_checkpoint(tmp_path / "evil.ckpt", **options)
    with pytest.raises(ConfigError, match="weights_only=False is not valid: expected True or None"):
        LanguageModule.load_from_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_code_that_it_names_is_wanted_in_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_pieces()
    write_pieces(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    _, path = saved(tmp_path, placement="my_placement.HalfNorm")
    consolidate(path, tmp_path / "a.safetensors")
    forget_pieces()
    (tmp_path / "my_placement.py").rename(tmp_path / "hidden")
    (tmp_path / "my_placement.py").write_text(
        f"import pathlib\n\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n{(tmp_path / 'hidden').read_text()}"
    )
    for source in (path, tmp_path / "a.safetensors"):
        with pytest.raises(ConfigError, match=r"model\.placement='my_placement\.HalfNorm' .* allow=my_placement"):
            LanguageModule.load_from_checkpoint(source)
        assert not (tmp_path / "ran").exists()
    assert LanguageModule.load_from_checkpoint(path, allow=["my_placement.HalfNorm"]).model is not None
    given = LanguageModule.load_from_checkpoint(path, model=tiny_values(placement="my_placement.HalfNorm"))
    assert given.model is not None, "what the caller names is the caller's own"
    forget_pieces()


def test_a_reference_in_it_is_not_followed(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["optim"]["schedule"] = "${oc.env:HOME}"
    torch.save(content, path)
    with pytest.raises(ConfigError, match=r"optim\.schedule=.* a saved configuration holds no references"):
        LanguageModule.load_from_checkpoint(path)


def safetensors(path: Path, weights: dict[str, Tensor], **metadata: str) -> Path:
    save_file(weights, path, metadata)
    return path


@pytest.mark.parametrize("kind", ["nothing", "text", "folder", "bare", "list", "sizes", "layers", "vocabulary", "cut"])
def test_what_is_no_checkpoint_is_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    sizes = {"model": {"dim": 2**17, "num_layers": 1, "num_heads": 1}, "optim": {}, "vocab_size": 50}
    weights = {"head.weight": torch.zeros(2, 2)}
    if kind == "text":
        path.write_text("no checkpoint")
    elif kind == "folder":
        path.mkdir()
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "cut":
        _, whole = saved(tmp_path)
        whole.write_bytes(whole.read_bytes()[:-500])
    elif kind != "nothing":
        said = {
            "bare": {},
            "sizes": {"hyper_parameters": json.dumps(sizes)},
            "layers": {"hyper_parameters": json.dumps({**sizes, "model": {"num_layers": 10**9}})},
            "vocabulary": {"hyper_parameters": json.dumps({**sizes, "vocab_size": "many"})},
        }[kind]
        path = safetensors(tmp_path / "a.safetensors", weights, **said)
    with pytest.raises(ConfigError, match=r"^checkpoint_path='.*' is not valid: ") as refused:
        LanguageModule.load_from_checkpoint(path)
    assert "\n" not in str(refused.value)


def test_it_is_no_method_of_a_module(tmp_path: Path) -> None:
    module, path = saved(tmp_path)
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        module.load_from_checkpoint(path)
    with pytest.raises(ConfigError, match=r"hparams_file='x\.yaml' is not valid"):
        LanguageModule.load_from_checkpoint(path, hparams_file="x.yaml")
