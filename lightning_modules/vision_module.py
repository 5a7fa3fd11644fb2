"""The LightningModule of images: classification, accuracy and calibration around a VisionTransformer."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from core.task import Task
from lightning_modules.config import ModelConfig
from lightning_modules.layers.router import RouterStats
from lightning_modules.transformer_module import TransformerModule
from lightning_modules.trunk import Batch
from lightning_modules.vision_transformer import ImageConfig, VisionTransformer

BINS = 15
"""Bins of confidence that the calibration error is taken over (1706.04599)."""
ASSUMED_GRID = 8
VALIDATION = "the last validation (data.val_batches x data.batch_size images)"


class _OfNumbers(Metric):
    """Is no number where a prediction was none, which torchmetrics would take for the first class."""

    unknown: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_state("unknown", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.unknown += (~preds.isfinite()).sum()
        super().update(preds.nan_to_num(), target)  # type: ignore[safe-super]  # of the metric it is mixed into

    def compute(self) -> Tensor:
        found: Tensor = super().compute()  # type: ignore[safe-super]
        return torch.where(self.unknown > 0, torch.nan, found)


class Accuracy(_OfNumbers, MulticlassAccuracy):
    """The share of right predictions."""


class CalibrationError(_OfNumbers, MulticlassCalibrationError):
    """The mean distance of confidence and accuracy."""


class VisionModule(TransformerModule):
    """Image classification.

    Args:
        model: fields of ModelConfig, as plain values; not causal.
        optim: fields of OptimConfig, as plain values.
        image_size: height and width of the images, in pixels.
        num_channels: of each pixel.
        num_classes: to tell apart.
        patch_size: height and width of a patch, a divisor of image_size.
        positions: learned, or rope, which is rotary in two dimensions.
        pool: what the head reads: class_token, or mean over the patches.

    Raises:
        ConfigError: anything about the model or its optimizer that cannot work, before weights are allocated.

    Logs what TransformerModule does, the losses in nats per image, and:

    | key | unit |
    |---|---|
    | val/accuracy | share of the images whose likeliest class is theirs |
    | val/calibration_error | mean distance of confidence and accuracy, by 15 bins of confidence, weighted by images |
    | test/accuracy, test/calibration_error | by trainer.test, what val/... are by validation |
    """

    task: ClassVar[Task] = Task(
        "nats per image",
        counted="images",
        position="position",
        predicted="the class of an image",
        sample="image",
        documents="images",
        figures=("accuracy", "calibration_error"),
        main="accuracy",
    )
    of_data: ClassVar[tuple[str, ...]] = ("image_size", "num_channels", "num_classes")
    model: VisionTransformer | None

    def __init__(
        self,
        model: dict[str, Any],
        optim: dict[str, Any],
        image_size: int,
        num_channels: int,
        num_classes: int,
        patch_size: int = 4,
        positions: str = "learned",
        pool: str = "class_token",
    ) -> None:
        super().__init__(model, optim)
        self.save_hyperparameters()
        self.images = ImageConfig(image_size, num_channels, num_classes, patch_size, positions, pool)
        self.try_out()
        metrics: dict[str, Any] = {
            "accuracy": Accuracy(num_classes, average="micro"),
            "calibration_error": CalibrationError(num_classes, n_bins=BINS, norm="l1"),
        }
        self.held_out_metrics = MetricCollection(metrics, compute_groups=False)

    def make_model(self, config: ModelConfig, **arguments: Any) -> VisionTransformer:
        return VisionTransformer(config, self.images, **arguments)

    @classmethod
    def assumed(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        size = arguments.get("patch_size", 4)
        return {"image_size": ASSUMED_GRID * size, "num_channels": 3, "num_classes": 10}

    def forward(self, images: Tensor) -> tuple[Tensor, list[RouterStats]]:
        """See VisionTransformer.forward."""
        assert self.model is not None, "configure_model() comes first"
        logits, router_stats = self.model(images)
        return logits.float(), router_stats

    def compute_loss(self, batch: Batch) -> tuple[Tensor, list[RouterStats]]:
        """Return (mean cross-entropy in nats per image, router statistics).

        Args:
            batch: "images", floating-point [batch, channels, height, width], and "labels", int64 [batch].
        """
        logits, router_stats = self(batch["images"])
        return F.cross_entropy(logits, batch["labels"]), router_stats

    def held_out_step(self, batch: Batch) -> tuple[Tensor, int]:
        logits, _ = self(batch["images"])
        self.held_out_metrics.update(logits.softmax(-1), batch["labels"])
        return F.cross_entropy(logits, batch["labels"]), len(logits)

    def further_metrics(self, stage: str) -> Sequence[MetricCollection]:
        if stage == "train":
            return ()
        self.held_out_metrics.prefix = f"{stage}/"
        return (self.held_out_metrics,)

    def on_train_end(self) -> None:
        """Say how much is right at the end, beside what the data say that something simpler reaches."""
        found = {name: self.trainer.callback_metrics.get(f"val/{name}") for name in self.task.figures}
        if self.trainer.is_global_zero and all(value is not None for value in found.values()):
            accuracy, calibration = (float(value) for value in found.values() if value is not None)
            print(f"Accuracy {accuracy:.2%} in {VALIDATION}, calibration error {calibration:.2%}")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the log-probability of each class, in nats, fp32 [batch, classes]."""
        logits, _ = self(batch["images"])
        return logits.log_softmax(-1)
