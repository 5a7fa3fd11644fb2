"""Measures how sharply the loss bends: the edge of stability (2103.00065)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from callbacks.scalars import write_scalars
from callbacks.statistics import add_to_transfer, gradient_statistics
from core.errors import InvalidValue, require
from core.precision import at_least_fp32

CARRIED = "curvature"


class Curvature(L.Callback):
    """Logs, for the first optimizer step and every n-th, before it changes the weights:

    | key | unit |
    |---|---|
    | curvature/top_eigenvalue | of the Hessian of the loss in nats per token, the one of largest magnitude |

    By power iteration from a fixed random vector on one held batch, the first of validation: for small models, at the
    memory of a backward pass through the backward pass. Auxiliary losses are left out.

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
        self._tokens = torch.empty(0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model: Any = pl_module.model
        name = type(self).__name__
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise InvalidValue("callbacks.curvature", name, "it needs every parameter whole in each process")
        if model.config.activation_checkpointing:
            raise InvalidValue("callbacks.curvature", name, "it cannot see through model.activation_checkpointing=true")
        if any(mixture.backend.name == "megablocks" for mixture in model.mixtures().values()):
            raise InvalidValue(
                "callbacks.curvature", name, "it cannot differentiate model.moe.backend=megablocks twice"
            )
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if datamodule is None:
            raise InvalidValue("callbacks.curvature", name, "it takes its batch from a DataModule, and there is none")
        batch = next(iter(datamodule.val_dataloader()))
        self._tokens = batch["tokens"][: self.sequences].to(pl_module.device)

    def _is_due(self, step: int) -> bool:
        return step == 1 or step % self.every_n_steps == 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches or not self._is_due(trainer.global_step + 1):
            return
        model: Any = pl_module.model
        was_training = model.training
        model.eval()  # the router's jitter would change the loss from product to product
        # Neither compiled blocks nor fused attention can be differentiated twice.
        stance: AbstractContextManager[Any] = (
            torch.compiler.set_stance("force_eager") if model.config.compile else nullcontext()
        )
        try:
            with stance, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
                logits, _ = model(self._tokens[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), self._tokens[:, 1:].flatten())
                add_to_transfer(
                    pl_module, CARRIED, top_eigenvalue(loss, list(model.parameters()), self.iterations).view(1)
                )
        finally:
            model.train(was_training)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        step = trainer.global_step + 1
        if self._is_due(step):
            (value,) = gradient_statistics(trainer, pl_module).carried[CARRIED]
            write_scalars(trainer, {"curvature/top_eigenvalue": value}, step)


def top_eigenvalue(loss: Tensor, parameters: Sequence[Tensor], iterations: int) -> Tensor:
    """Return the Hessian's eigenvalue of largest magnitude, a scalar; its error falls with the gap to the next one.

    Args:
        loss: a scalar, whose graph can be differentiated twice.
        parameters: what the Hessian is taken in.
        iterations: products with it.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    generator = torch.Generator(loss.device).manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype) for p in parameters]
    eigenvalue = loss.new_zeros(())
    for _ in range(iterations):
        norm = torch.nn.utils.get_total_norm([at_least_fp32(v) for v in vector])
        vector = [(v / norm).to(v.dtype) for v in vector]
        product = torch.autograd.grad(gradients, parameters, vector, retain_graph=True, materialize_grads=True)
        pairs = [(at_least_fp32(v), at_least_fp32(p)) for v, p in zip(vector, product, strict=True)]
        eigenvalue = torch.stack([(v * p).sum() for v, p in pairs]).sum()
        vector = list(product)
    return eigenvalue.detach()
