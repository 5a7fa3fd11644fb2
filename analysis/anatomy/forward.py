"""Takes one batch through a whole model by its own forward, which is what hooks see."""

from torch import Tensor

from analysis.anatomy.text import Batch
from lightning_modules.transformer import Transformer


def run(model: Transformer, batch: Batch) -> None:
    """Take a batch through a model for what hooks see of it."""
    inputs, positions, _ = _on_its_device(model, batch)
    model(inputs, positions, logits_to_keep=1)


def token_losses(model: Transformer, batch: Batch) -> Tensor:
    """Return the loss of each target in nats, [batch, seq]."""
    inputs, positions, targets = _on_its_device(model, batch)
    losses, _ = model(inputs, positions, targets=targets)
    by_token: Tensor = losses.by_token
    return by_token.view_as(targets)


def _on_its_device(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
    device = model.head.weight.device
    positions = None if batch.positions is None else batch.positions.to(device)
    return batch.inputs.to(device), positions, batch.targets.to(device)
