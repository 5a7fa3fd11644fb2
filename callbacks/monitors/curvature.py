"""Measures how sharply the loss bends: the edge of stability (2103.00065)."""

from typing import Any

import lightning as L
from torch import Tensor
from torch.distributed.tensor import DTensor

from analysis.curvature import differentiable_twice, obstacle, top_eigenvalue
from callbacks.scalars import write_scalars
from callbacks.statistics import add_to_transfer, gradient_statistics
from core.errors import InvalidValue, require

CARRIED = "curvature"


class Curvature(L.Callback):
    """Logs, for the first optimizer step and every n-th, before it changes the weights:

    | key | unit |
    |---|---|
    | curvature/top_eigenvalue | of the Hessian of the loss in nats, the one of largest magnitude |

    By Lanczos' iteration from a fixed random vector (analysis/curvature.py) on one held batch, the first of validation:
    for small models, at the memory of a backward pass through the backward pass. Auxiliary losses are left out.

    Args:
        every_n_steps: optimizer steps between two estimates.
        sequences: at most so many of the held batch.
        iterations: products with the Hessian per estimate; close eigenvalues want more.

    Raises:
        ConfigError: one of them is less than 1, parameters are sharded, activations checkpointed, experts megablocks',
            or the Trainer has no DataModule.
    """

    def __init__(self, every_n_steps: int = 500, sequences: int = 2, iterations: int = 20) -> None:
        for field, value in (("every_n_steps", every_n_steps), ("sequences", sequences), ("iterations", iterations)):
            require(value >= 1, f"callbacks.curvature.{field}", value, "an integer >= 1")
        self.every_n_steps, self.sequences, self.iterations = every_n_steps, sequences, iterations
        self._held: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model: Any = pl_module.model
        name = type(self).__name__
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise InvalidValue("callbacks.curvature", name, "it needs every parameter whole in each process")
        if (reason := obstacle(model)) is not None:
            raise InvalidValue("callbacks.curvature", name, reason)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if datamodule is None:
            raise InvalidValue("callbacks.curvature", name, "it takes its batch from a DataModule, and there is none")
        batch = next(iter(datamodule.val_dataloader()))
        held = model.excerpt(batch, self.sequences)
        self._held = {name: tensor.to(pl_module.device) for name, tensor in held.items()}

    def _is_due(self, step: int) -> bool:
        return step == 1 or step % self.every_n_steps == 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches or not self._is_due(trainer.global_step + 1):
            return
        model: Any = pl_module.model
        with differentiable_twice(model):
            found = top_eigenvalue(model.loss(self._held), list(model.parameters()), self.iterations)
        add_to_transfer(pl_module, CARRIED, found.view(1))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        step = trainer.global_step + 1
        if self._is_due(step):
            (value,) = gradient_statistics(trainer, pl_module).carried[CARRIED]
            write_scalars(trainer, {"curvature/top_eigenvalue": value}, step)
