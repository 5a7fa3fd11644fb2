"""One safetensors file of a run's weights, from a checkpoint that is a file or a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor

from core.errors import ConfigError, UserError
from lightning_modules.language_module import LanguageModule
from tests.support.models import make_module, tokens
from tools.consolidate import consolidate, main


def save(path: Path, folder: bool, dtype: torch.dtype, **overrides: Any) -> LanguageModule:
    """As a run of one process does, or one of several."""
    module = make_module(**overrides).to(dtype)
    beside = {"global_step": 7, "hyper_parameters": dict(module.hparams)}
    if folder:
        dcp.save({"state_dict": module.state_dict()}, checkpoint_id=path, no_dist=True)
        torch.save(beside, path / "meta.pt")
    else:
        path.parent.mkdir(parents=True)
        torch.save({"state_dict": module.state_dict(), **beside}, path)
    return module


@pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled.*")
@pytest.mark.parametrize(
    ("name", "folder", "dtype"),
    [("last", False, torch.float32), ("last", True, torch.float32), ("best", True, torch.bfloat16)],
)
def test_the_file_gives_the_model_back(tmp_path: Path, name: str, folder: bool, dtype: torch.dtype) -> None:
    checkpoints = tmp_path / "checkpoints"
    trained = save(checkpoints / f"{name}.ckpt", folder, dtype, ffn="moe", tie_embeddings=True)
    main([str(tmp_path), f"checkpoint={name}"])
    (tmp_path / "any").touch()
    assert (checkpoints / f"{name}.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
    with safe_open(checkpoints / f"{name}.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "7"
        module = LanguageModule(**json.loads(file.metadata()["hyper_parameters"]))
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {weight.dtype for weight in weights.values()} == {dtype}, "what the run trained in"
    module.configure_model()
    module.to(dtype)
    assert module.model is not None
    assert trained.model is not None
    missing, unexpected = module.model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["head.weight"], []), "tied: there once"
    batch = tokens(2, 9)
    torch.testing.assert_close(module.model(batch)[0], trained.model(batch)[0], atol=0, rtol=0)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.ckpt").write_bytes(b"PK")
    for name in ("absent.ckpt", "broken.ckpt"):
        with pytest.raises(UserError, match="cannot be read as a checkpoint of this project"):
            consolidate(tmp_path / name, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def hostile(folder: Path, weights: dict[str, Tensor]) -> Path:
    """A run of which there is only a checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    hyper_parameters = {"vocab_size": 4, "model": {}, "optim": {}}
    content = {"state_dict": weights, "global_step": 1, "hyper_parameters": hyper_parameters}
    torch.save(content, folder / "checkpoints/last.ckpt")
    return folder


def test_weights_that_safetensors_does_not_take_are_refused_in_a_line(tmp_path: Path) -> None:
    shared = torch.zeros(4)
    run = hostile(tmp_path / "run", {"model.a": shared[:3], "model.b": shared[1:]})
    with pytest.raises(UserError, match="Some tensors share memory"):
        consolidate(run / "checkpoints/last.ckpt", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_link_in_the_run_does_not_lead_the_output_out_of_it(tmp_path: Path) -> None:
    run = hostile(tmp_path / "run", {"model.a": torch.zeros(4)})
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="by a link: nothing is written there; output="):
        main([str(run)])
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["last.ckpt"]
    main([str(run), f"output={tmp_path}/out.safetensors"])
    assert (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("output", ["checkpoints/last.ckpt", "config.yaml", "folder.safetensors", "checkpoints"])
def test_an_output_that_could_be_something_else_of_the_run_is_refused(tmp_path: Path, output: str) -> None:
    save(tmp_path / "checkpoints/last.ckpt", False, torch.float32)
    (tmp_path / "config.yaml").write_text("seed: 0")
    (tmp_path / "folder.safetensors").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"output='.*' is not valid: expected the name of a file that ends in .safet"):
        main([str(tmp_path), f"output={tmp_path / output}"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
