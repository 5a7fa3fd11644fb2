"""Initializations, orthogonal to placement: each gives the standard deviation of every matrix by its role.

    init         base   times                                                             source
    plain        std    1                                                                 GPT-2's 0.02 by default
    fan_in       F      1                                                                 unit variance in, and out
    megatron     std    1/sqrt(2L) on O and D                                             1909.08053
    scale_init   F      1/sqrt(L) on O and D; L and the matrices selectable               2601.22580, reconstructed
    deepnorm     X      (8L)^(-1/4) on V, O, U and D                                      2203.00555, figure 2
    b2t          X      1/sqrt(L) on Q, K, V, O, U and D                                  2206.00330, reconstructed
    subln        X      sqrt(ln 2L) on V, O, U and D                                      2210.06423
    deepscalelm  F      sqrt(2/L) on O and D; 1/sqrt(E silu(z)^2) on D; r^(-1/4) on V, O  2403.09635, partly derived

    L: number of blocks. Q, K, V, O: attention's query, key, value and output matrices; U: the FFN's gate and up
    matrices, D: its down matrix, and those of experts alike. F: 1/sqrt(fan_in). X: sqrt(2 / (fan_in + fan_out))
    (Xavier) on these; F on embedding and head.

All draws are normal with mean 0; a truncation draws anew what is further out than so many standard deviations. An
embedding lookup has fan-in 1. The router is always drawn with 0.02, so that the experts start nearly balanced whatever
the init. Matrices of placements and norms (residual) start as these say whatever the init, some at zero; one of which
they say nothing is drawn as a matrix outside of the blocks is. Norm gains start at 1 and biases at 0.
"""

import fnmatch
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from spannorm.errors import InvalidArgument
from spannorm.import_path import find
from spannorm.matrices import ROLES, Matrix, Role
from spannorm.norms import EmbeddingScale
from spannorm.placements.base import Placement

Init = Callable[[Matrix], float]
"""Returns the standard deviation that a matrix is drawn with."""

ROUTER_STD = 0.02
"""The standard deviation of every router."""
TARGETS = ("attn_out", "value", "ffn_up", "ffn_down")
"""The matrices that an init may scale with depth."""
OUTPUTS = ("attn_out", "ffn_down")
"""The two matrices that end a residual branch."""
BLOCK = ("query", "key", *TARGETS)
SILU_POWER = 0.3557755
"""The mean of silu(z)^2 over a standard normal z."""


def _fan_in(matrix: Matrix) -> float:
    return matrix.fan_in**-0.5


def _xavier(matrix: Matrix) -> float:
    """Keep the variance forward and back on average (Glorot and Bengio 2010); outside blocks, forward alone."""
    return (2 / (matrix.fan_in + matrix.fan_out)) ** 0.5 if matrix.role in BLOCK else _fan_in(matrix)


def _fairseq(matrix: Matrix) -> float:
    """Return what fairseq's attention and torch's linear layers draw with."""
    if matrix.role in ("query", "key", "value"):
        return _xavier(matrix) / 2**0.5
    return (3 * matrix.fan_in) ** -0.5 if matrix.role in ("ffn_up", "ffn_down") else _xavier(matrix)


def _small(matrix: Matrix) -> float:
    """Return sqrt(2 / (5 dim)) (1910.05895), where dim is the width of the stream that the matrix reads or writes."""
    dim = matrix.fan_out if matrix.role in ("embedding", *OUTPUTS) else matrix.fan_in
    return (2 / (5 * dim)) ** 0.5


def _scaled(base: Init, scale: float, targets: Collection[str]) -> Init:
    return lambda matrix: base(matrix) * (scale if matrix.role in targets else 1.0)


def _with(init: Init, stds: Mapping[str, float | None]) -> Init:
    """Return `init`, except for the roles that have a standard deviation of their own."""
    own = {role: std for role, std in stds.items() if std is not None}
    return lambda matrix: own[matrix.role] if matrix.role in own else init(matrix)


def _check_layers(num_layers: int) -> None:
    if num_layers < 1:
        raise InvalidArgument("num_layers", num_layers, "an integer >= 1")


def _check_choice(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise InvalidArgument(name, value, f"one of {', '.join(choices)}")


def plain_init(num_layers: int, std: float = 0.02, embedding_std: float | None = None) -> Init:
    """Draw every matrix with the same standard deviation.

    Args:
        num_layers: number of blocks; not used.
        std: the standard deviation of all matrices.
        embedding_std: that of the embedding; None takes `std`.
    """
    return _with(lambda matrix: std, {"embedding": embedding_std})


def fan_in_init(num_layers: int) -> Init:
    """Draw every matrix with 1/sqrt(fan_in), so that every product keeps the variance of its input."""
    return _fan_in


def megatron_init(num_layers: int, std: float | None = 0.02, head: Literal["std", "fan_in"] = "std") -> Init:
    """Draw as `plain_init`, with the two matrices that end a residual branch times 1/sqrt(2L) (1909.08053).

    Args:
        num_layers: number of blocks.
        std: the standard deviation of all other matrices; None takes sqrt(2 / (5 dim)), as HybridNorm has it
            (2503.04598).
        head: what an untied head is drawn with: `std`, or 1/sqrt(dim) (`fan_in`).

    Raises:
        InvalidArgument: fewer than one block, or another `head`.
    """
    _check_layers(num_layers)
    _check_choice("head", head, "std", "fan_in")
    base = _small if std is None else plain_init(num_layers, std)
    scaled = _scaled(base, (2 * num_layers) ** -0.5, OUTPUTS)
    return (lambda matrix: _fan_in(matrix) if matrix.role == "head" else scaled(matrix)) if head == "fan_in" else scaled


def scale_init(
    num_layers: int, factor: Literal["blocks", "sublayers"] = "blocks", targets: Sequence[str] = OUTPUTS
) -> Init:
    """Draw as ScaleInit (2601.22580): fan_in, with the target matrices times 1/sqrt(L).

    Each branch then has variance O(1/L). This is reconstructed, as the paper's text could not be had: whether L counts
    blocks or sublayers, and which matrices are scaled, is therefore a parameter.

    Args:
        num_layers: number of blocks.
        factor: whether L is the number of blocks, or that of sublayers, which is twice as many.
        targets: which of attn_out, value, ffn_up and ffn_down to scale.

    Raises:
        InvalidArgument: fewer than one block, another `factor`, or a target that is none of these.
    """
    _check_layers(num_layers)
    _check_choice("factor", factor, "blocks", "sublayers")
    for target in targets:
        if target not in TARGETS:
            raise InvalidArgument("targets", list(targets), f"a list of {', '.join(TARGETS)}")
    return _scaled(_fan_in, (num_layers if factor == "blocks" else 2 * num_layers) ** -0.5, targets)


def deepnorm_init(num_layers: int) -> Init:
    """Draw as Xavier with the gain (8L)^(-1/4) on values, outputs and FFN (2203.00555, the decoder-only case)."""
    _check_layers(num_layers)
    return _scaled(_xavier, (8 * num_layers) ** -0.25, TARGETS)


def b2t_init(num_layers: int, base: Literal["xavier", "fairseq"] = "xavier") -> Init:
    """Draw as Xavier times 1/sqrt(L) on every matrix of the blocks (2206.00330).

    The paper scales all but the norms; that its base is Xavier, and that embedding and head are left alone, is
    reconstructed.

    Args:
        num_layers: number of blocks.
        base: xavier, or fairseq for what the authors' code starts from: Xavier / sqrt(2) on Q, K and V, Xavier on O,
            and 1/sqrt(3 fan_in) on U and D (their draws are uniform, ours normal with the same standard deviation).

    Raises:
        InvalidArgument: fewer than one block, or another `base`.
    """
    _check_layers(num_layers)
    _check_choice("base", base, "xavier", "fairseq")
    return _scaled(_fairseq if base == "fairseq" else _xavier, num_layers**-0.5, BLOCK)


def subln_init(num_layers: int) -> Init:
    """Draw as Xavier with the gain sqrt(ln 2L) on values, outputs and FFN (2210.06423, the decoder-only case)."""
    _check_layers(num_layers)
    return _scaled(_xavier, math.log(2 * num_layers) ** 0.5, TARGETS)


def deepscalelm_init(num_layers: int, correlation: float = 1.0) -> Init:
    """Draw as DeepScaleLM does: branches of unit variance, weighted by 2/L (2403.09635).

    The paper gives queries and keys 1/sqrt(fan_in), and branches the variance 2/L. Two parts are derived here: the
    value and output matrices share the factor 1/sqrt(r) that undoes attention's averaging, and a SwiGLU's down matrix
    undoes its hidden layer's power E silu(z)^2 (the paper has ReLU). One part is left out: the paper multiplies the
    skip connections by sqrt(1 - 2/L), which no init can do.

    Args:
        num_layers: number of blocks.
        correlation: r, the mean correlation of two tokens at attention's input: the share of the values' variance that
            is left after averaging over tokens. The paper computes it for each layer from the data.

    Raises:
        InvalidArgument: fewer than one block, or a correlation that is not in (0, 1].
    """
    _check_layers(num_layers)
    if not 0 < correlation <= 1:
        raise InvalidArgument("correlation", correlation, "a number in (0, 1]")
    attention = _scaled(_fan_in, correlation**-0.25, ("value", "attn_out"))
    return _scaled(_scaled(attention, SILU_POWER**-0.5, ["ffn_down"]), min(1.0, 2 / num_layers) ** 0.5, OUTPUTS)


INITS: dict[str, Callable[..., Init]] = {
    "plain": plain_init,
    "fan_in": fan_in_init,
    "megatron": megatron_init,
    "scale_init": scale_init,
    "deepnorm": deepnorm_init,
    "b2t": b2t_init,
    "subln": subln_init,
    "deepscalelm": deepscalelm_init,
}
"""The inits by name. Each is called with the number of blocks and its own options, and returns an Init."""


def find_init(name: str) -> Callable[..., Init]:
    """Return an entry of INITS, or a function of your own by its import path.

    Raises:
        InvalidArgument: there is none of that name.
    """
    return find("init", name, INITS)


def initialize(
    model: nn.Module, init: Init, roles: Mapping[str, Role], truncation: float | None = None
) -> dict[str, Matrix]:
    """Draw every weight matrix of any model anew, from torch's global generator.

    Norm gains, biases and other vectors keep their values. What placements own needs no role, and starts as they say.
    A matrix has the layout of torch's linear layers and embeddings, [outputs, inputs] or [tokens, dim]; of a stack of
    them the last two dimensions count. A parameter that is both embedding and head (tied) may stand in `roles` under
    either name, or under both.

        initialize(model, scale_init(num_layers=12), {
            "embedding.weight": "embedding", "head.weight": "head",
            "*.attn.*_proj.weight": "query", "*.attn.out_proj.weight": "attn_out", ...
        })

    Queries, keys and values in one matrix may be called `query` by the inits that treat the three alike (plain, fan_in,
    megatron, scale_init, and b2t but for its fan-out); the others need them apart.

    Args:
        model: owns the matrices.
        init: gives each one's standard deviation, as `scale_init(num_layers)` returns it.
        roles: what each matrix does, by the name of its parameter or a shell pattern of names. Of several patterns that
            match, the last one counts.
        truncation: draw anew what is further out than so many standard deviations; None draws nothing anew.

    Returns:
        Every matrix that was drawn, by the name of its parameter.

    Raises:
        InvalidArgument: a matrix without a role, a role without a matrix, a standard deviation that is not positive, or
            a truncation that is not.
    """
    if truncation is not None and not 0 < truncation < math.inf:
        raise InvalidArgument("truncation", truncation, "a number > 0, or None")
    matrices = dict(_matrices(model, roles))
    stds = [standard_deviation(init, matrix) for matrix in matrices.values()]  # all, before any is drawn
    for matrix, std in zip(matrices.values(), stds, strict=True):
        draw(matrix.weight, std, truncation)
        if matrix.role == "embedding":
            start_at_unit_variance(model, std)
    return matrices


def _matrices(model: nn.Module, roles: Mapping[str, Role]) -> Iterator[tuple[str, Matrix]]:
    """Yield the model's matrices by name, each once, in the order of its parameters."""
    for role in roles.values():
        if role not in ROLES:
            raise InvalidArgument("roles", role, f"roles of {', '.join(ROLES)}")
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    placements = [module for module in model.modules() if isinstance(module, Placement)]
    of_placements = {parameter for placement in placements for parameter in placement.parameters()}
    owned = {matrix.weight: matrix for placement in placements for matrix in placement.matrices()}
    matched: set[str] = set()
    for weight, aliases in names.items():
        found = {pattern: role for pattern, role in roles.items() if any(_matches(name, pattern) for name in aliases)}
        matched |= found.keys()
        if weight in owned:
            yield aliases[0], owned[weight]
        if weight.dim() < 2 or weight in of_placements:
            continue
        if not found:
            raise InvalidArgument("roles", list(roles), f"a role for every matrix: {aliases[0]} has none")
        role = list(found.values())[-1]
        outputs, inputs = weight.shape[-2:]
        tied = {"embedding", "head"} <= set(found.values()) or (len(aliases) > 1 and role in ("embedding", "head"))
        if tied or role == "embedding":
            # A lookup sums one row; a tied matrix is used as a head too, and that is what bounds its scale.
            yield aliases[0], Matrix("embedding", weight, inputs if tied else 1, inputs)
        else:
            yield aliases[0], Matrix(role, weight, inputs, outputs)
    if unused := [pattern for pattern in roles if pattern not in matched]:
        raise InvalidArgument("roles", unused[0], "the name of a parameter of this model, or a pattern of names")


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def standard_deviation(init: Init, matrix: Matrix) -> float:
    """Return what a matrix is drawn with: its own standard deviation, of a router ROUTER_STD, or else the init's.

    Raises:
        InvalidArgument: the init's is not a finite number > 0; of 0, no gradient would reach what comes before the
            matrix.
    """
    if matrix.std is not None:
        return matrix.std
    std = ROUTER_STD if matrix.role == "router" else init(matrix)
    if not isinstance(std, int | float) or not 0 < std < math.inf:
        raise InvalidArgument("init", std, f"a finite standard deviation > 0 for {matrix.role}")
    return std


@torch.no_grad()
def draw(weight: Tensor, std: float, truncation: float | None = None) -> None:
    """Fill a weight from the normal distribution of mean 0, with torch's global generator.

    A weight that is sharded over processes (a DTensor) gets the numbers that it would get in one process: each process
    draws all of it and keeps its part.

    Args:
        weight: filled in place.
        std: the standard deviation; 0 takes no random numbers.
        truncation: draw anew what is further out than so many standard deviations; None draws nothing anew.
    """
    if std == 0:
        weight.zero_()
        return
    if not torch.distributed.is_available():
        _fill(weight, std, truncation)
        return
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(weight, DTensor):
        whole = _fill(torch.empty(weight.shape, dtype=weight.dtype, device=weight.device), std, truncation)
        weight.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None))
    else:
        _fill(weight, std, truncation)


def _fill(weight: Tensor, std: float, truncation: float | None) -> Tensor:
    if truncation is None:
        return nn.init.normal_(weight, std=std)
    return nn.init.trunc_normal_(weight, std=std, a=-truncation * std, b=truncation * std)


@torch.no_grad()
def start_at_unit_variance(model: nn.Module, embedding_std: float) -> None:
    """Let a model's EmbeddingScale start at 1 / embedding_std, where it is made to give a stream of unit variance."""
    for module in model.modules():
        if isinstance(module, EmbeddingScale) and module.is_unit:
            module.weight.fill_(1 / embedding_std)
