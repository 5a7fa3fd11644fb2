"""Takes one batch through a whole model, block by block as the model itself does, which is what hooks see."""

from torch import Tensor

from analysis.anatomy.held_out import Batch
from lightning_modules.trunk import Trunk


def run(model: Trunk, batch: Batch) -> None:
    """Take a batch through a model for what hooks see of it."""
    model.through_blocks(*model.entry(on_its_device(model, batch.rows)))


def target_losses(model: Trunk, batch: Batch) -> Tensor:
    """Return the loss of each target in nats, [batch, asked]."""
    rows = on_its_device(model, batch.rows)
    state, _ = model.through_blocks(*model.entry(rows))
    return model.losses(model.read(state, rows), batch.targets.to(state.device))


def on_its_device(model: Trunk, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch's rows on the device of a model."""
    return {name: values.to(model.head.weight.device) for name, values in rows.items()}
