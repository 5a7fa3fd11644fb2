"""Finds how sharply the loss bends: the ends of the Hessian's spectrum, by products with it alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis.evaluating import evaluating
from core.precision import at_least_fp32

Vector = list[Tensor]
"""A vector in the space of the parameters, in parts of their shapes."""


@contextmanager
def differentiable_twice(model: Any) -> Iterator[None]:
    """Run a Transformer, within the context, so that its loss can be differentiated twice, without random numbers.

    Neither compiled blocks nor fused attention can be, and a router's jitter would change the loss from product to
    product.
    """
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        yield


def obstacle(model: Any) -> str | None:
    """Return why the loss of a Transformer cannot be differentiated twice; None: it can."""
    if model.config.activation_checkpointing:
        return "it cannot see through model.activation_checkpointing=true"
    if any(mixture.backend.name == "megablocks" for mixture in model.mixtures().values()):
        return "it cannot differentiate model.moe.backend=megablocks twice"
    return None


def hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Callable[[Vector], Vector]:
    """Return the function that multiplies the Hessian of the loss in the parameters by a vector.

    Args:
        loss: a scalar, whose graph can be differentiated twice.
        parameters: what the Hessian is taken in.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    bent = [gradient for gradient in gradients if gradient.requires_grad]  # in the others the loss is linear

    def multiply(vector: Vector) -> Vector:
        pairs = zip(vector, gradients, strict=True)
        narrow = [part.to(gradient.dtype) for part, gradient in pairs if gradient.requires_grad]
        return list(torch.autograd.grad(bent, parameters, narrow, retain_graph=True, materialize_grads=True))

    return multiply


def extreme_eigenvalues(
    multiply: Callable[[Vector], Vector], like: Sequence[Tensor], iterations: int
) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest eigenvalue of a symmetric operator, scalars in fp32 or wider.

    By Lanczos' iteration from a fixed random vector. Nothing is orthogonalized again, so that three vectors are all it
    holds: rounding then repeats eigenvalues, but those at the ends stay right (Paige 1971). Both approach from inside.

    Args:
        multiply: the operator.
        like: tensors of the shapes, types and device of a vector's parts.
        iterations: products with the operator; close eigenvalues want more.
    """
    generator = torch.Generator(like[0].device).manual_seed(0)
    types = [torch.promote_types(part.dtype, torch.float32) for part in like]
    vector = [
        torch.randn(part.shape, generator=generator, device=part.device, dtype=dtype)
        for part, dtype in zip(like, types, strict=True)
    ]
    before = [torch.zeros_like(part) for part in vector]
    length = _norm(vector)
    diagonal, beside = list[Tensor](), list[Tensor]()
    while True:
        vector = [part / length for part in vector]
        product = [at_least_fp32(part) for part in multiply(vector)]
        diagonal.append(_inner(product, vector))
        back = beside[-1] if beside else torch.zeros_like(length)
        rest = [p - diagonal[-1] * v - back * b for p, v, b in zip(product, vector, before, strict=True)]
        before, vector, length = vector, rest, _norm(rest)
        scale = torch.stack([*diagonal, *beside]).abs().amax()
        # Nothing is left where the operator's own space is spanned; a number that is none compares as false.
        if len(diagonal) == iterations or not length > torch.finfo(length.dtype).eps * scale:
            break
        beside.append(length)
    matrix = torch.stack(diagonal).diag()
    if beside:
        matrix = matrix + torch.stack(beside).diag(1) + torch.stack(beside).diag(-1)
    if not matrix.isfinite().all():
        return matrix.new_full((), math.nan), matrix.new_full((), math.nan)
    eigenvalues = torch.linalg.eigvalsh(matrix.cpu()).to(matrix.device)
    return eigenvalues[0], eigenvalues[-1]


def top_eigenvalue(loss: Tensor, parameters: Sequence[Tensor], iterations: int) -> Tensor:
    """Return the Hessian's eigenvalue of largest magnitude, a scalar; its error falls with the gap to the next one.

    Args:
        loss: a scalar, whose graph can be differentiated twice.
        parameters: what the Hessian is taken in.
        iterations: products with it.
    """
    smallest, largest = extreme_eigenvalues(hessian_product(loss, parameters), parameters, iterations)
    return torch.where(smallest.abs() > largest.abs(), smallest, largest)


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two vectors that come in parts."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _norm(vector: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(list(vector))
