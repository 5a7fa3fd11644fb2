"""Rounds numbers to those that few bits can say, and computes with them as before: fake quantization."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_modules.layers.attention import Attention
from lightning_modules.layers.experts import ExpertMLP
from lightning_modules.layers.ffn import MLP, FeedForward
from lightning_modules.trunk import Trunk


def round_to_bits(x: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Return x with each slice along `dim` rounded to the nearest of 2^bits - 1 values.

    They are the multiples, from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1, of s = max |x| / (2^(bits - 1) - 1) over the
    slice: symmetric, nothing is clipped, 0 stays 0, and a tie goes to the even multiple. The slice of a weight is what
    makes one output ("per channel"), that of an activation a token's features ("per token").

    Args:
        x: any floating type; s is in fp32 or wider.
        bits: 2 or more.
        dim: along which the values have one scale.
    """
    most = 2 ** (bits - 1) - 1
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(dim, keepdim=True) / most
    scale = torch.where(scale > 0, scale, 1.0)
    return ((wide / scale).round().clamp(-most, most) * scale).to(x.dtype)


@contextmanager
def fake_quantization(
    model: Trunk, weight_bits: int | None, activation_bits: int | None, ends: bool = False
) -> Iterator[None]:
    """Let a model compute, within the context, with rounded weights and activations.

    Meant are the matrices of attention, dense FFN and experts, shared ones too, and what is multiplied with them.
    Norms, biases, routers, a placement's own matrices, and the products of queries, keys and values stay as they are.
    Afterwards the weights are again what they were, to the bit.

    Args:
        model: not sharded, and its experts no megablocks'.
        weight_bits: None: the weights stay.
        activation_bits: None: the activations stay.
        ends: whether it is the embedding and the head as well; of the embedding the rows, one a token, are rounded. Of
            images it is the projection of patches and what is added to them, and what comes out of the last block is
            rounded before it is pooled.
    """
    with ExitStack() as stack:
        if weight_bits is not None:
            kept = {weight: weight.detach().clone() for weight, _, _ in _weights(model, ends)}
            stack.callback(_restore, kept)
            for weight, rows, dim in _weights(model, ends):
                with torch.no_grad():
                    weight.copy_(round_to_bits(weight.unflatten(0, (-1, rows)), weight_bits, dim).flatten(0, 1))
        if activation_bits is not None:
            for handle in _hooks(model, ends, lambda x: round_to_bits(x, activation_bits)):
                stack.callback(handle.remove)
        yield


@torch.no_grad()
def _restore(kept: dict[Tensor, Tensor]) -> None:
    for weight, before in kept.items():
        weight.copy_(before)


def _layers(model: Trunk) -> Iterator[nn.Linear | ExpertMLP]:
    """Yield what multiplies in attention, FFN and experts."""
    for module in model.modules():
        if isinstance(module, Attention):
            yield from (module.q_proj, module.k_proj, module.v_proj, module.o_proj)
        elif isinstance(module, FeedForward | MLP):
            yield from (layer for layer in module.children() if isinstance(layer, nn.Linear))
        elif isinstance(module, ExpertMLP):
            yield module


def _weights(model: Trunk, ends: bool) -> Iterator[tuple[Tensor, int, int]]:
    """Yield (weight, how many of its rows are one matrix, which dimension of [matrices, rows, columns] is summed)."""
    for layer in _layers(model):
        if isinstance(layer, nn.Linear):
            yield layer.weight, len(layer.weight), -1
        else:
            yield from ((weight, layer.hidden_dim, -1) for weight in (layer.w1, layer.v1))
            yield layer.w2, layer.hidden_dim, -2  # it is stored as [hidden, dim]
    if ends:
        yield from ((matrix.weight, len(matrix.weight), -1) for matrix in model.outside_matrices())


def _hooks(model: Trunk, ends: bool, change: Callable[[Tensor], Tensor]) -> Iterator[RemovableHandle]:
    """Have what comes to each product changed, and yield the hooks that do it."""

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return change(inputs[0]), *inputs[1:]

    for layer in _layers(model):
        yield layer.register_forward_pre_hook(before)
        if isinstance(layer, ExpertMLP):  # between its products
            yield layer.inner_norm.register_forward_hook(lambda module, inputs, output: change(output))
    if ends:  # the head's own forward is passed over where losses are asked for
        for module in model.children():
            if isinstance(module, nn.Linear) and module is not model.head:  # of patches; a lookup multiplies nothing
                yield module.register_forward_pre_hook(before)
        yield model.blocks[-1].register_forward_hook(lambda module, inputs, output: (change(output[0]), output[1]))
