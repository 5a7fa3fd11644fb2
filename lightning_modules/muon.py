"""Muon (2409.20325, kellerjordan.github.io/posts/muon): momentum, of which each matrix is orthogonalized.

torch.optim.Muon is not used: it takes whole matrices alone, where a layer's experts are stacked in one parameter and a
sharded matrix is in parts; it iterates in bfloat16 everywhere; and a Trainer takes one optimizer, where the parameters
that are no hidden matrices want AdamW. For plain matrices the two agree (tests/lightning_modules/test_muon.py).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_modules.decayed_step import decay_and_add
from lightning_modules.width_scaling import WidthScaling
from spannorm import Matrix

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a x + b x^3 + c x^5, which takes singular values from (0, 1] to about 1 in a few steps."""

Scale = Callable[[float, float], float]
"""(outputs, inputs) of a matrix -> what its orthogonalized update is multiplied by, beside the learning rate."""


def original(outputs: float, inputs: float) -> float:
    """Return sqrt(max(1, outputs / inputs)), as Keller Jordan has it."""
    return max(1.0, outputs / inputs) ** 0.5


def match_rms_adamw(outputs: float, inputs: float) -> float:
    """Return 0.2 sqrt(max(outputs, inputs)): the update's entries are then as large as AdamW's (2502.16982, eq. 4)."""
    return 0.2 * max(outputs, inputs) ** 0.5


SCALES: dict[str, Scale] = {"match_rms_adamw": match_rms_adamw, "original": original}
"""By torch.optim.Muon's names."""


def width_factor(scaling: WidthScaling, matrix: Matrix, scale: Scale) -> float:
    """Return the factor on the learning rate that keeps an update's effect on the outputs at any width.

    An orthogonalized update's spectral norm is what it is multiplied by, and should grow as sqrt(outputs / inputs)
    (2310.17813, condition 1). What of that the scale already does is taken out.
    """
    if scaling.kind == "none":
        return 1.0
    base = scaling.at_base(matrix)
    wanted = math.sqrt(matrix.fan_out / matrix.fan_in / (base.fan_out / base.fan_in))
    return wanted * scale(base.fan_out, base.fan_in) / scale(matrix.fan_out, matrix.fan_in)


def num_rows(matrix: Matrix) -> int:
    """Return how many rows of the weight are one matrix: all, or those of one of several stacked experts.

    Experts' down matrices are stored the other way round, [hidden, dim].
    """
    return int(matrix.fan_out if matrix.weight.size(1) == matrix.fan_in else matrix.fan_in)


def orthogonalize(x: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    """Return U S V^T of x = U D V^T, with S near 1, by Newton-Schulz iterations on the Gram matrix of the shorter side.

    Args:
        x: matrices, [..., rows, columns].
        steps: iterations.
        coefficients: of the quintic.
        eps: least Frobenius norm that a matrix is divided by.

    Returns:
        The same shape and type.
    """
    a, b, c = coefficients
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(eps)  # no singular value is then above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Takes Muon's step for the groups that say how many rows a matrix has, and AdamW's, torch's own, for all others.

    Of a matrix' gradient g at rate r: m = momentum m + (1 - momentum) g; u = m, or g + momentum (m - g) with nesterov;
    w = (1 - r weight_decay) w - r update_factor orthogonalize(u).

    A sharded matrix is gathered, orthogonalized in each process that has a part of it, and cut again; experts that a
    process has whole are not gathered. Momentum stays in parts.

    Args:
        params: groups. Those with `matrix_rows` > 0 are Muon's: so many rows of each parameter are one matrix, and
            `update_factor` is on top of the rate.
        lr: learning rate where a group has none.
        betas, eps: AdamW's.
        momentum, nesterov: Muon's.
        ns_steps, ns_coefficients, ns_eps: the iteration's; see orthogonalize.
        ns_dtype: what it computes in; None: bfloat16 on an accelerator, fp32 or the weights' wider type on a CPU.
        fused: whether AdamW's part is torch's fused one.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        ns_eps: float = 1e-7,
        ns_dtype: str | None = None,
        fused: bool = False,
    ) -> None:
        of_adamw = _adamw(fused).defaults
        of_muon = {
            **{"matrix_rows": 0, "update_factor": 1.0, "momentum": momentum, "nesterov": nesterov},
            **{"ns_steps": ns_steps, "ns_coefficients": tuple(ns_coefficients), "ns_eps": ns_eps, "ns_dtype": ns_dtype},
        }
        # All groups have all settings: what a group does not use changes nothing.
        super().__init__(params, {**of_adamw, "lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, **of_muon})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; the closure, where there is one, computes the loss and its gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rest = [group for group in self.param_groups if not group["matrix_rows"]]
        if rest:
            adamw = _adamw(rest[0]["fused"])
            adamw.param_groups, adamw.state = rest, self.state
            adamw.step()
        for group in self.param_groups:
            for parameter in group["params"] if group["matrix_rows"] else ():
                if parameter.grad is not None:
                    self._step_matrix(parameter, group)
        return loss

    def _step_matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = _orthogonalize_parts(update, group)
        decay, factor = group["lr"] * group["weight_decay"], -group["lr"] * group["update_factor"]
        decay_and_add(parameter, decay, update, factor)


def _adamw(fused: bool) -> torch.optim.AdamW:
    """Return torch's AdamW, which is handed groups and state: torch has no public function of the step alone."""
    return torch.optim.AdamW([torch.empty(0)], fused=fused)


def _orthogonalize_parts(update: Tensor, group: dict[str, Any]) -> Tensor:
    """Return the update with each of its matrices orthogonalized, sharded as it was."""
    if not isinstance(update, DTensor):
        return _orthogonalize_stack(update, group)
    mesh, placements = update.device_mesh, update.placements
    if _holds_whole_matrices(update, group["matrix_rows"]):
        own = _orthogonalize_stack(update.to_local(), group)
        return DTensor.from_local(own, mesh, placements, run_check=False, shape=update.shape, stride=update.stride())
    # All processes compute the same, so each takes its part and nothing is sent.
    return distribute_tensor(_orthogonalize_stack(update.full_tensor(), group), mesh, placements, src_data_rank=None)


def _holds_whole_matrices(update: DTensor, rows: int) -> bool:
    """Return whether each process has some of several stacked matrices, and all of these."""
    return tuple(update.placements) == (Shard(0),) and (update.size(0) // rows) % update.device_mesh.size() == 0


def _orthogonalize_stack(update: Tensor, group: dict[str, Any]) -> Tensor:
    stack = update.unflatten(0, (-1, group["matrix_rows"])).to(_iteration_dtype(update, group["ns_dtype"]))
    out = orthogonalize(stack, group["ns_steps"], group["ns_coefficients"], group["ns_eps"])
    return out.flatten(0, 1).to(update.dtype)


def _iteration_dtype(update: Tensor, name: str | None) -> torch.dtype:
    if name is not None:
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    on_cpu = update.device.type in ("cpu", "meta")
    return torch.promote_types(update.dtype, torch.float32) if on_cpu else torch.bfloat16
