"""Classification of images: what is measured of it, what is refused, and that placements know nothing of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from core.errors import ConfigError
from lightning_modules.initialization import initialize
from lightning_modules.optimizers import OPTIMIZERS
from lightning_modules.vision_module import BINS, VisionModule
from lightning_modules.vision_transformer import POOLS, POSITIONS
from spannorm import INITS, NORMS, PLACEMENTS
from tests.support.fitting import Batch, make_trainer
from tests.support.images import IMAGES, make_images_model, make_vision_module

ALL = {"placement": PLACEMENTS, "init": INITS, "norm": NORMS}


def learns(model: torch.nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, steps: int) -> bool:
    """Whether the loss has a gradient in every parameter within some steps, and falls."""
    still, losses = dict(model.named_parameters()), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss(batch)  # type: ignore[operator]
        loss.backward()
        losses.append(float(loss.detach()))
        still = {name: p for name, p in still.items() if p.grad is None or not p.grad.abs().max() > 0}
        optimizer.step()
    return not still and losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("ffn", ["dense", "mlp", "moe"])
@pytest.mark.parametrize(("axis", "name"), [(axis, name) for axis, names in ALL.items() for name in names])
def test_every_placement_init_and_norm_learns_images(axis: str, name: str, ffn: str) -> None:
    model = make_images_model(ffn=ffn, **{axis: name})
    initialize(model)
    batch = model.example(6, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    assert learns(model, batch, optimizer, 12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_images(name: str) -> None:
    module = make_vision_module({"optimizer": name, "lr": 1e-2 if name == "muon" else 3e-3})
    trained = module.model
    assert trained is not None
    from lightning_modules.optimizers import make_optimizer

    optimizer = make_optimizer(trained, module.optim_config)
    counted = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert counted == sum(p.numel() for p in trained.parameters()), "each parameter once"
    assert learns(trained, trained.example(6, 0), optimizer, 12)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_where_a_patch_stands_matters_and_where_nothing_says_it_does_not(positions: str, pool: str) -> None:
    model = make_images_model(replace(IMAGES, positions=positions, pool=pool)).eval()
    initialize(model)
    images = model.example(2, 0)["images"]
    moved = torch.cat((images[..., 2:], images[..., :2]), dim=-1)  # by a patch
    assert not torch.allclose(model(images)[0], model(moved)[0], atol=1e-4)
    if positions == "learned":
        with torch.no_grad():
            assert model.position is not None
            model.position[1 if pool == "class_token" else 0 :] = 0.5  # the same everywhere
        torch.testing.assert_close(model(images)[0], model(moved)[0], atol=1e-5, rtol=1e-4)


def test_a_patch_is_its_pixels_by_channel_row_and_column() -> None:
    images = replace(IMAGES, num_channels=3, patch_size=4, pool="mean")
    model = make_images_model(images)
    picture = model.example(1, 0)["images"]
    assert model.position is not None
    found = model.embed(picture) - model.position
    convolved = F.conv2d(picture, model.embedding.weight.view(32, 3, 4, 4), stride=4)
    torch.testing.assert_close(found, convolved.flatten(2).mT, atol=1e-5, rtol=1e-5)


def calibration_error(confidence: torch.Tensor, right: torch.Tensor) -> float:
    """Of 1706.04599, equation 3, written out."""
    error = 0.0
    for number in range(BINS):
        inside = (confidence > number / BINS) & (confidence <= (number + 1) / BINS)
        if inside.any():
            gap = (right[inside].double().mean() - confidence[inside].double().mean()).abs()
            error += float(gap) * int(inside.sum()) / len(right)
    return error


def test_what_validation_reports(tmp_path: Path) -> None:
    module = make_vision_module(num_layers=1)
    model = module.model
    assert model is not None
    batches = [model.example(size, 0) for size in (200, 120)]
    with torch.no_grad():
        model.head.weight.mul_(8)  # or it would be sure of nothing
        for batch in batches:  # right in every other bin: with bins of other bounds it would be another error
            confidence, guess = model(batch["images"])[0].softmax(-1).max(-1)
            batch["labels"] = (guess + (confidence * BINS).ceil().long() % 2) % 5
        logits = torch.cat([model(batch["images"])[0] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    loader = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer = make_trainer(tmp_path, logger=False)
    other: Any = torch.utils.data.DataLoader([model.example(8, 0)], batch_size=None)  # type: ignore[arg-type]
    for stage, call in (("val", trainer.validate), ("test", trainer.test)):
        call(module, other, verbose=False)  # of which nothing is to be left
        (found,) = call(module, loader, verbose=False)
        confidence, guess = logits.softmax(-1).max(-1)
        assert found[f"{stage}/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
        assert found[f"{stage}/accuracy"] == pytest.approx(float((guess == labels).double().mean()), rel=1e-6)
        expected = calibration_error(confidence, guess == labels)
        assert expected > 0.05
        assert found[f"{stage}/calibration_error"] == pytest.approx(expected, rel=1e-4)
    predicted = torch.cat(trainer.predict(module, loader))  # type: ignore[arg-type]
    torch.testing.assert_close(predicted, logits.log_softmax(-1))


def test_a_model_that_has_diverged_is_never_the_best(tmp_path: Path) -> None:
    """All images are of the class that torchmetrics takes a prediction for that is no number."""
    module = make_vision_module(num_layers=1)
    assert module.model is not None
    batch = module.model.example(8, 0)
    batch["labels"].zero_()
    loader: Any = torch.utils.data.DataLoader([batch] * 3, batch_size=None)  # type: ignore[arg-type]
    best = ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max", save_on_train_epoch_end=False)
    options = {"max_steps": 3, "enable_checkpointing": True, "val_check_interval": 1, "logger": False}
    trainer = make_trainer(tmp_path, callbacks=[Poison(), best], **options)
    trainer.fit(module, loader, loader)
    assert all(trainer.callback_metrics[f"val/{name}"].isnan() for name in module.task.figures)
    assert torch.load(best.best_model_path)["global_step"] < 3
    with torch.no_grad():
        module.model.head.weight.fill_(0.0)
    (found,) = trainer.validate(module, loader, verbose=False)
    assert found["val/accuracy"] == 1.0, "nothing is left of what was no number"


class Poison(L.Callback):
    """Makes the head no number in the last of three steps."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            with torch.no_grad():
                pl_module.model.head.weight[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("module", "model", "message"),
    [
        ({"patch_size": 3}, {}, r"module\.patch_size=3 is not valid: expected a divisor of data\.image_size=8"),
        ({"positions": "rotary"}, {}, r"module\.positions='rotary' .* learned, rope"),
        ({"pool": "max"}, {}, r"module\.pool='max' .* class_token, mean"),
        ({"num_classes": 1}, {}, r"data\.num_classes=1"),
        ({}, {"causal": True}, r"model\.causal=True is not valid: expected false for images"),
        ({}, {"tie_embeddings": True}, r"model\.tie_embeddings=True"),
        ({}, {"vocab_size": 7}, r"model\.vocab_size=7"),
        ({"positions": "rope"}, {"head_dim": 6}, r"model\.head_dim=6 is not valid: expected a multiple of 4"),
    ],
)
def test_what_cannot_be_is_refused(module: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_vision_module(module=module, **model)


@pytest.mark.parametrize(
    ("change", "readable"),
    [
        ({}, True),
        ({"labels": torch.tensor([0, 5])}, False),
        ({"labels": torch.tensor([0, -1])}, False),
        ({"labels": torch.tensor([0, 1, 2])}, False),
        ({"labels": torch.tensor([0.0, 1.0])}, False),
        ({"images": torch.zeros(2, 3, 8, 8)}, False),
        ({"images": torch.zeros(2, 1, 8, 6)}, False),
        ({"images": torch.zeros(2, 1, 8, 8, dtype=torch.int64)}, False),
        ({"images": torch.zeros(0, 1, 8, 8), "labels": torch.zeros(0, dtype=torch.int64)}, False),
        ({"images": None}, False),
        ({"labels": None}, False),
    ],
)
def test_a_model_knows_what_it_can_read(change: dict[str, Any], readable: bool) -> None:
    batch = {**make_images_model().example(2, 0), **change}
    assert make_images_model().can_read({name: part for name, part in batch.items() if part is not None}) is readable


def test_a_checkpoint_gives_the_module_back(tmp_path: Path) -> None:
    module = make_vision_module(module={"positions": "rope", "pool": "mean"})
    model = module.model
    assert model is not None
    batch = model.example(4, 0)
    loader = torch.utils.data.DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0, logger=False)
    trainer.fit(module, loader, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = VisionModule.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch["images"])[0], module.eval()(batch["images"])[0])
    assert loaded.images == module.images


@pytest.mark.parametrize("pool", POOLS)
def test_a_model_in_half_precision_takes_batches_as_the_data_have_them(pool: str) -> None:
    model = make_images_model(replace(IMAGES, pool=pool)).bfloat16()
    initialize(model)
    batch = model.example(3, 0)
    assert batch["images"].dtype == torch.float32
    assert model(batch["images"])[0].dtype == torch.bfloat16
    model.loss(batch).backward()


def test_flops_count_the_head_once_an_image() -> None:
    model = make_images_model(num_layers=1)
    outside = model.embedding.weight.numel() + model.head.weight.numel() / model.images.num_positions
    blocks = sum(p.numel() for p in model.blocks.parameters())
    attention = 12 * model.config.attention_width * 17
    assert model.flops_per_token(17) == pytest.approx(6 * (blocks + outside) + attention, rel=1e-3)


def test_the_stream_has_unit_variance_under_dyt() -> None:
    model = make_images_model(norm="dyt", num_layers=1, dim=256, num_heads=4)
    initialize(model)
    embedded = model.embed(model.example(32, 0)["images"])[:, 1:]
    scaled = model.blocks[0].embedding_scale(embedded).detach()  # type: ignore[operator]
    assert float(scaled.square().mean()) == pytest.approx(1, rel=0.1)
