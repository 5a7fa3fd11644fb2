"""A model that starts from trained weights has them, all of them, and says what it has not."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import ConfigError
from lightning_modules.language_module import LanguageModule
from lightning_modules.warm_start import model_of, warm_start
from tests.support.models import VOCAB_SIZE, make_module, tiny_values, tokens
from tests.support.runs import load, run, tiny_job, train
from tools.consolidate import consolidate


def weights_of(module: LanguageModule) -> dict[str, Tensor]:
    assert module.model is not None
    return {name: tensor.clone() for name, tensor in module.model.state_dict().items()}


def trained(folder: Path, **overrides: Any) -> tuple[LanguageModule, Path]:
    """A model with weights that no init gives, and the file of them."""
    module = make_module(**overrides)
    assert module.model is not None
    with torch.no_grad():
        for number, parameter in enumerate(module.model.parameters()):
            parameter.copy_(torch.randn_like(parameter) + number)
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in weights_of(module).items()}, path)
    return module, path


def started(source: Path, **overrides: Any) -> LanguageModule:
    module = LanguageModule(tiny_values(**overrides), {"warmup_steps": 0}, VOCAB_SIZE)
    module.start_from(source)
    module.configure_model()
    return module


@pytest.mark.parametrize(
    "overrides", [{}, {"ffn": "moe", "moe": {"balancing": "bias"}}, {"tie_embeddings": True}], ids=str
)
def test_every_tensor_is_the_sources(overrides: dict[str, Any], tmp_path: Path) -> None:
    module, path = trained(tmp_path, **overrides)
    for source in (path, tmp_path):  # the file, and the folder that it is in
        found, expected = weights_of(started(source, **overrides)), weights_of(module)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_placement_takes_what_has_a_counterpart_and_names_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, path = trained(tmp_path, placement="prenorm")
    drawn = weights_of(make_module(placement="sandwich"))
    with caplog.at_level("INFO"):
        torch.manual_seed(0)
        found = weights_of(started(path, placement="sandwich"))
    source = weights_of(module)
    new = sorted(found.keys() - source.keys())
    assert new
    assert all(".placement." in name for name in new)
    assert f"as the init says: {', '.join(new)}" in caplog.text
    assert all(torch.equal(found[name], source[name]) for name in found.keys() & source.keys())
    assert all(found[name].shape == drawn[name].shape for name in new)
    back = warm_start(path, started(path, placement="prenorm").model or nn.Module())
    assert (back.new, back.unused) == ([], [])


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        ({"placement": "prenorm", "placement_options": {"gpas": True}}, 0.0),
        ({"placement": "hc"}, 1e-5),
        ({"placement": "attnres"}, 1e-4),
        ({"placement": "attnres", "placement_options": {"group": 3}}, 1e-4),
    ],
    ids=str,
)
def test_weights_of_prenorm_make_the_same_function_at_the_start(
    overrides: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    """To the bit, or but for the eps of norms and the rounding of a mean."""
    values = {"num_layers": 3, "norm_eps": 1e-9}
    module, sequence = make_module(placement="prenorm", init="fan_in", **values), tokens(2, 9)
    assert module.model is not None
    for parameter in module.model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)  # a gain that is not taken shows
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in weights_of(module).items()}, path)
    expected, found = module.model(sequence)[0], started(path, **overrides, **values).model(sequence)[0]  # type: ignore[misc]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"num_layers": 3}, r"blocks\.2\..* is \[.*\] here, and the source has none"),
        ({"num_layers": 1}, r"there is no blocks\.1\."),
        ({"ffn_dim": 64}, r"ffn\.\w+\.weight is \[64, 32\] here, and the source has \[48, 32\]"),
        ({"ffn": "moe"}, r"is \[.*\] here, and the source has none"),
        ({"num_kv_heads": 2}, r"k_proj\.weight is \[16, 32\] here, and the source has \[32, 32\]"),
    ],
    ids=str,
)
def test_another_size_is_refused_by_name(overrides: dict[str, Any], reason: str, tmp_path: Path) -> None:
    _, path = trained(tmp_path)
    with pytest.raises(ConfigError, match=rf"init_from='.*model\.safetensors' is not valid: .*{reason}"):
        started(path, **overrides)


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"\x08\0\0\0\0\0\0\0{}      "], ids=["none", "empty", "json", "no tensors"]
)
def test_what_is_no_weights_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="init_from=") as caught:
        started(path)
    assert "\n" not in str(caught.value)


def test_numbers_of_another_kind_are_no_weights(tmp_path: Path) -> None:
    module, path = trained(tmp_path)
    tensors = {name: tensor.contiguous() for name, tensor in weights_of(module).items()}
    for dtype in (torch.int32, torch.complex64):
        save_file({**tensors, "embedding.weight": tensors["embedding.weight"].to(dtype)}, path)
        with pytest.raises(ConfigError, match=rf"in floating point: embedding\.weight is {dtype}"):
            started(path)


def test_an_index_names_files_beside_it_and_no_others(tmp_path: Path) -> None:
    module, path = trained(tmp_path)
    path.rename(tmp_path / "part.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"embedding.weight": "part.safetensors"}}')
    expected = weights_of(module)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(started(tmp_path)).items())
    index.write_text('{"weight_map": {"embedding.weight": "../part.safetensors"}}')
    with pytest.raises(ConfigError, match="names of files beside it"):
        started(tmp_path)


def test_a_run_goes_on_from_another_ones_weights_at_step_0(tmp_path: Path) -> None:
    first = run(tmp_path, "first", "trainer.max_steps=3", "optim.lr=1e-2")
    weights = load(first / "checkpoints/last.ckpt")["state_dict"]
    file = tmp_path / "weights.safetensors"
    consolidate(first / "checkpoints/last.ckpt", file)
    ends = []
    for name, source in (("a", first), ("b", file), ("c", first / "checkpoints/last.ckpt")):
        overrides = [
            f"init_from={source}",
            "optim.lr=0",
            "optim.weight_decay=0",
            "trainer.max_steps=2",
            f"run_dir={name}",
        ]
        done = train(tmp_path, *tiny_job(*overrides))
        assert done.code == 0, done.err
        content = load(tmp_path / name / "checkpoints/last.ckpt")
        assert content["global_step"] == 2
        ends.append(content["state_dict"])
    for end in ends:  # at a rate of 0 they are still the first run's
        assert all(torch.equal(end[name], weights[name]) for name in weights)


def test_a_resumed_run_keeps_its_own_weights(tmp_path: Path) -> None:
    first = run(tmp_path, "first", "trainer.max_steps=2")
    job = tiny_job(f"init_from={first}", "run_dir=second")
    assert train(tmp_path, *job, "trainer.max_steps=2").code == 0
    for path in (first / "checkpoints").iterdir():
        path.unlink()  # what it began from is gone, and not needed
    resumed = train(tmp_path, *job, "trainer.max_steps=4", "ckpt_path=last")
    assert resumed.code == 0, resumed.err
    assert load(tmp_path / "second/checkpoints/last.ckpt")["global_step"] == 4


def test_a_mistake_leaves_no_folder(tmp_path: Path) -> None:
    for source in ("nowhere", "''", "[1]"):
        done = train(tmp_path, *tiny_job(f"init_from={source}", "run_dir=new"))
        assert done.code == 2, done.out
        assert "Error: init_from=" in done.err, done.err
        assert not (tmp_path / "new").exists()


def test_a_pipe_that_an_index_names_is_not_waited_for(tmp_path: Path) -> None:
    _, path = trained(tmp_path)
    path.unlink()
    os.mkfifo(tmp_path / "part.safetensors")
    descriptor = os.open(tmp_path / "part.safetensors", os.O_RDWR)  # else who does wait would do so without end
    try:
        (tmp_path / "model.safetensors.index.json").write_text(
            '{"weight_map": {"embedding.weight": "part.safetensors"}}'
        )
        with pytest.raises(ConfigError, match=r"init_from='.*' is not valid: .*part\.safetensors is no regular file"):
            started(tmp_path)
    finally:
        os.close(descriptor)


def test_heads_that_no_shape_tells_and_an_architecture_that_nobody_gave(tmp_path: Path) -> None:
    first = run(tmp_path, "first", "model.rope_theta=77", "trainer.max_steps=1")
    file = tmp_path / "weights.safetensors"
    consolidate(first / "checkpoints/last.ckpt", file)
    for source in (first, first / "checkpoints/last.ckpt", file):
        found = model_of(source)
        assert found is not None
        assert (found["dim"], found["rope_theta"], found["moe.num_experts"]) == (32, 77.0, 4)
        assert not found.keys() & {"init", "compile", "moe.backend", "moe.z_loss_weight"}
        module = LanguageModule({"dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 48}, {}, 257)
        with pytest.raises(ConfigError, match=r"model\.num_heads=4 is not valid: expected 2, as in"):
            module.start_from(source)
    _, path = trained(tmp_path)
    assert model_of(path) is None


def test_logits_of_a_width_scaled_run_want_its_scaling(tmp_path: Path) -> None:
    """The multiplier on them is in no tensor."""
    scaled = ["optim.width_scaling=mup", "optim.base_width=16"]
    first = run(tmp_path, "first", *scaled, "trainer.max_steps=1")
    file = tmp_path / "weights.safetensors"
    consolidate(first / "checkpoints/last.ckpt", file)
    model = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48}
    for source in (first, first / "checkpoints/last.ckpt", file):
        valid = (
            r"optim\.width_scaling='none' is not valid: expected 'mup' with optim\.base_width=16, as of .*by 0\.5, and"
        )
        with pytest.raises(ConfigError, match=valid):
            LanguageModule(model, {}, 257).start_from(source)
        LanguageModule(model, {"width_scaling": "mup", "base_width": 16}, 257).start_from(source)
    done = train(tmp_path, *tiny_job(f"init_from={first}", "run_dir=second"))
    assert done.code == 2
    assert "optim.width_scaling='none' is not valid" in done.err
    assert not (tmp_path / "second").exists()
