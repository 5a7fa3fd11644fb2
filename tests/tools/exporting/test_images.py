"""An exported classifier computes what the training's model does, and transformers loads it, images and all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from core.errors import ConfigError
from core.open_run import open_run
from datamodules.images.class_folders import FolderImages
from datamodules.images.samples import ImageSamples
from lightning_modules.vision_transformer import POOLS, POSITIONS, VisionTransformer
from spannorm import PLACEMENTS
from tests.support.exports import exported
from tests.support.images import IMAGES, make_images_model
from tests.support.runs import tiny_job, train
from tools.examination.examine import Chosen, examine
from tools.export import ExportConfig, export
from tools.exporting import images, remote_code
from tools.exporting.modeling_placement_image import PlacementForImageClassification, PlacementImageConfig

RNG = np.random.default_rng(0)
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(({}, {"placement": name}) for name in PLACEMENTS),
    *(({"positions": positions, "pool": pool}, {"num_kv_heads": 2}) for positions in POSITIONS for pool in POOLS),
    ({"num_channels": 3, "patch_size": 4}, {"ffn": "mlp", "bias": True, "norm": "layernorm"}),
    ({}, {"ffn": "moe", "moe": {"num_shared_experts": 1, "balancing": "bias"}}),
]


def pair(of_images: dict[str, Any], **options: Any) -> tuple[VisionTransformer, Any]:
    """The training's model and the exported one, of the same random weights under which a wrong norm would show."""
    ours = make_images_model(replace(IMAGES, **of_images), num_layers=3, **options).double()
    ours.output_multiplier = 0.7
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.15)
    theirs = PlacementForImageClassification(PlacementImageConfig(**images.configuration(ours))).double()
    assert not any(theirs.load_state_dict(remote_code.weights(ours)))
    return ours, theirs


@pytest.mark.parametrize(("of_images", "options"), CASES, ids=str)
def test_logits_loss_and_gradients_are_those_of_training(of_images: dict[str, Any], options: dict[str, Any]) -> None:
    ours, theirs = pair(of_images, **options)
    batch = ours.example(4, 0)
    pixels, labels = batch["images"].double(), batch["labels"]
    close = {"atol": 1e-10, "rtol": 1e-10}
    logits = ours(pixels)[0]
    assert logits.std() > 1e-3
    out = theirs(pixels, labels=labels)
    torch.testing.assert_close(out.logits, logits, **close)
    F.cross_entropy(logits, labels).backward()
    out.loss.backward()
    found = dict(theirs.model.named_parameters())
    for name, weight in ours.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(found[name].grad, weight.grad, atol=1e-6, rtol=1e-5)  # its loss is in fp32


def test_what_it_does_not_know_is_refused() -> None:
    _, theirs = pair({})
    with pytest.raises(
        ValueError, match=r"pixel_values=\[1, 3, 8, 8\] is not valid: expected a tensor \[batch, 1, 8, 8\]"
    ):
        theirs(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="output_attentions"):
        theirs(torch.zeros(1, 1, 8, 8), output_attentions=True)


def train_on_folders(tmp_path: Path, *overrides: str) -> None:
    """Train in tmp_path/run on a folder of cats and dogs."""
    for split, number in (("train", 6), ("val", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for n in range(number):
                Image.fromarray(RNG.integers(0, 256, (8, 11, 3)).astype(np.uint8)).save(
                    tmp_path / "images" / split / name / f"{n}.png"
                )
    data = ["data=images", f"data.path={tmp_path / 'images'}", "data.image_size=8", "data.num_workers=0", *overrides]
    job = [*tiny_job("experiment=vision_spannorm"), *data, "data.val_batches=2", "run_dir=run"]
    finished = train(tmp_path, *dict.fromkeys(job))
    assert finished.code == 0, finished.err


@pytest.mark.parametrize("change", ["renamed", "added"])
def test_classes_are_not_named_by_folders_that_have_changed_since(change: str, tmp_path: Path) -> None:
    train_on_folders(tmp_path)
    for split in ("train", "val"):
        folder = tmp_path / "images" / split
        (folder / "cat").rename(folder / "zebra") if change == "renamed" else shutil.copytree(
            folder / "cat", folder / "a"
        )
    with pytest.raises(ConfigError, match=r"data\.path=.*expected the images that the run was trained on"):
        exported(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"data\.path=.*expected the images that the run was trained on"):
        examine(Chosen((tmp_path / "run",), ("layer_drop",), tokens=8))


def test_weights_are_written_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    train_on_folders(tmp_path)
    export(ExportConfig(tmp_path / "run", tmp_path / "out", dtype="bfloat16"))
    weights = load_file(tmp_path / "out/model.safetensors")
    assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.usefixtures("hub_modules")
def test_transformers_loads_a_run_with_its_classes_and_its_images(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    mean, std = [0.2, 0.4, 0.6], [0.3, 0.2, 0.5]
    train_on_folders(tmp_path, f"data.mean={mean}", f"data.std={std}")
    said = exported(tmp_path / "run", tmp_path / "out")
    assert "PlacementForImageClassification" in said
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert model.config.id2label == {0: "cat", 1: "dog"}
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False)
    for height, width in ((8, 8), (8, 11), (11, 8), (31, 47), (47, 31), (100, 13), (13, 100), (7, 5), (33, 50)):
        picture = tmp_path / "picture.png"
        Image.fromarray(RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(picture)
        pixels = processor(Image.open(picture), return_tensors="pt")["pixel_values"]
        source = FolderImages([picture], np.ones(1, np.int64))
        mine = torch.from_numpy(ImageSamples(source, 8, 3, mean, std, seed=0).read(np.zeros(1, np.int64))["images"][0])
        torch.testing.assert_close(pixels[0], mine, atol=1e-5, rtol=0, msg=lambda text, of=picture: f"{of}: {text}")
    with torch.no_grad():
        expected = open_run(tmp_path / "run").module(mine[None])[0]
        torch.testing.assert_close(model(mine[None]).logits, expected, atol=1e-5, rtol=1e-5)
