"""Every scheme a second time: its equation as the paper prints it, and the numbers that follow from it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.support import reference


def norms_of(module: nn.Module, eps: float) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every norm of a module by its name, written out from its gain and, where it has one, its bias."""
    parameters = dict(module.named_parameters())

    def written_out(gain: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        if bias is None:
            return lambda x: reference.rms_norm(x, gain, eps)
        return lambda x: reference.rms_norm(x - x.mean(dim=-1, keepdim=True), gain, eps) + bias

    return {
        name.removesuffix(".weight"): written_out(gain, parameters.get(name.replace(".weight", ".bias")))
        for name, gain in parameters.items()
        if gain.dim() == 1 and name.endswith(".weight")
    }


class At(NamedTuple):
    """One block, as an equation sees it: number l of L, its sublayers, and its norms by name."""

    l: int  # noqa: E741 - as in the papers
    L: int
    A: Callable[[Tensor], Tensor]
    F: Callable[[Tensor], Tensor]
    N: Callable[[str, Tensor], Tensor]
    gate: Tensor | None
    P: dict[str, Tensor] = {}  # noqa: RUF012 - read only; the placement's parameters by name


def prenorm(b: At, x: Tensor) -> Tensor:
    y = x + b.A(b.N("norm_attn", x))
    return y + b.F(b.N("norm_ffn", y))


def postnorm(b: At, x: Tensor) -> Tensor:
    y = b.N("norm_attn", x + b.A(x))
    return b.N("norm_ffn", y + b.F(y))


def spannorm(b: At, x: Tensor) -> Tensor:
    y = b.N("norm_attn", x + b.A(b.N("first_norm", x) if b.l == 1 else x))
    return b.N("norm_ffn", x + b.F(y))


def deepnorm(b: At, x: Tensor) -> Tensor:
    alpha = 2.0 ** (3 / 4)  # (2 x 4)^(1/4)
    assert b.L == 4
    y = b.N("norm_attn", x * alpha + b.A(x))
    return b.N("norm_ffn", y * alpha + b.F(y))


def b2t(b: At, x: Tensor) -> Tensor:
    y = b.N("norm_attn", x + b.A(x))
    return b.N("norm_ffn", y + b.F(y) + (0 if b.l == b.L else 1) * x)


def b2t_with_every_skip(b: At, x: Tensor) -> Tensor:
    y = b.N("norm_attn", x + b.A(x))
    return b.N("norm_ffn", x + y + b.F(y))


def sandwich(b: At, x: Tensor) -> Tensor:
    y = x + b.N("norm_attn_out", b.A(b.N("norm_attn_in", x)))
    return y + b.N("norm_ffn_out", b.F(b.N("norm_ffn_in", y)))


def perinorm(b: At, x: Tensor) -> Tensor:
    return sandwich(b, b.N("norm_embedding", x) if b.l == 1 else x)


def outputnorm(b: At, x: Tensor) -> Tensor:
    y = x + b.N("norm_attn", b.A(x))
    return y + b.N("norm_ffn", b.F(y))


def hybridnorm(b: At, x: Tensor) -> Tensor:
    z = b.N("norm_ffn", x + b.A(x))
    return z + b.F(z)


def hybridnorm_star(b: At, x: Tensor) -> Tensor:
    return prenorm(b, x) if b.l == 1 else hybridnorm(b, x)


def mixln(b: At, x: Tensor) -> Tensor:
    b = b._replace(N=lambda name, h, norm=b.N: norm(f"inner.{name}", h))  # the first quarter of 4 blocks is block 1
    return postnorm(b, x) if b.l == 1 else prenorm(b, x)


def lnscaling(b: At, x: Tensor) -> Tensor:
    y = x + b.A(b.N("norm_attn", x) / b.l**0.5)
    return y + b.F(b.N("norm_ffn", y) / b.l**0.5)


def residual(b: At, state: Any) -> Any:
    h, r = state if b.l > 1 else (state, state)
    a = b.A(h)
    h_mid = b.N("norm_attn", h + a)
    f = b.F(h_mid)
    return b.N("norm_ffn", h_mid + f), r + a + f


def keel(b: At, x: Tensor) -> Tensor:
    assert b.L == 4
    y = b.N("norm_attn_out", 8 * x + b.A(b.N("norm_attn_in", x)))
    return b.N("norm_ffn_out", 8 * y + b.F(b.N("norm_ffn_in", y)))


def keel_eased(b: At, x: Tensor) -> Tensor:
    if b.l > 1:
        return keel(b, x)
    y = x + b.A(b.N("norm_attn_in", x))
    return b.N("norm_ffn_out", y + b.F(b.N("norm_ffn_in", y)))


def siamesenorm(b: At, state: Any) -> Any:
    x, y = state if b.l > 1 else (state, state)
    a = b.A(b.N("norms_attn.in", x + b.N("norms_attn.y", y)))
    x, y = b.N("norms_attn.x", x + a / b.l**0.5), y + a
    f = b.F(b.N("norms_ffn.in", x + b.N("norms_ffn.y", y)))
    return b.N("norms_ffn.x", x + f / b.l**0.5), y + f


def rezero(b: At, x: Tensor) -> Tensor:
    assert b.gate is not None
    y = x + b.gate * b.A(x)
    return y + b.gate * b.F(y)


class _Shrink(torch.autograd.Function):
    """x (1 - g sigmoid(g)), of which a gradient in x does not know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return x * (1 - gate / (1 + (-gate).exp()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        share = 1 / (1 + (-gate).exp())
        slope = share + gate * share * (1 - share)
        return grad, -(slope * (grad * x).sum()).view_as(gate)


def shrink(b: At, x: Tensor) -> Tensor:
    assert b.gate is not None
    out: Tensor = _Shrink.apply(x, b.gate)
    return out


def prenorm_gpas(b: At, x: Tensor) -> Tensor:
    y = shrink(b, x + b.A(b.N("norm_attn", x)))
    return shrink(b, y + b.F(b.N("norm_ffn", y)))


def sandwich_gpas(b: At, x: Tensor) -> Tensor:
    y = shrink(b, x + b.N("norm_attn_out", b.A(b.N("norm_attn_in", x))))
    return shrink(b, y + b.N("norm_ffn_out", b.F(b.N("norm_ffn_in", y))))


def lnscaling_gpas(b: At, x: Tensor) -> Tensor:
    y = shrink(b, x + b.A(b.N("norm_attn", x) / b.l**0.5))
    return shrink(b, y + b.F(b.N("norm_ffn", y) / b.l**0.5))


def postnorm_gpas(b: At, x: Tensor, alpha: float = 1.0) -> Tensor:
    y = b.N("norm_attn", shrink(b, x) * alpha + b.A(x))
    return b.N("norm_ffn", shrink(b, y) * alpha + b.F(y))


def deepnorm_gpas(b: At, x: Tensor) -> Tensor:
    assert b.L == 4
    return postnorm_gpas(b, x, 2.0 ** (3 / 4))


def mixln_gpas(b: At, x: Tensor) -> Tensor:
    b = b._replace(N=lambda name, h, norm=b.N: norm(f"inner.{name}", h))
    return postnorm_gpas(b, x) if b.l == 1 else prenorm_gpas(b, x)


def read(b: At, name: str, sources: list[Tensor]) -> Tensor:
    """The sum over sources v of exp(w . N v) v, divided by the sum of these exponentials."""
    query = b.P[f"{name}.query"].squeeze(0)
    shares = [((b.N(name, v) * query).sum(-1, keepdim=True)).exp() for v in sources]
    return sum((s * v for s, v in zip(shares, sources, strict=True)), torch.zeros(())) / sum(shares)


def attnres(b: At, state: Any, group: int = 1) -> Any:
    """`state` is every sublayer's output so far; sources are made of them anew each time."""

    def sources() -> list[Tensor]:
        groups = [outputs[i : i + group] for i in range(0, len(outputs), group)]
        return [embedding, *(torch.stack(each).sum(0) for each in groups)]

    embedding, *outputs = state if b.l > 1 else [state]
    h = embedding if b.l == 1 else read(b, "read_attn", sources())
    outputs.append(b.A(b.N("norm_attn", h)))
    outputs.append(b.F(b.N("norm_ffn", read(b, "read_ffn", sources()))))
    return [embedding, *outputs] if b.l < b.L else [embedding, *sources()[1:]]


def attnres_by_2(b: At, state: Any) -> Any:
    return attnres(b, state, 2)


def attnres_by_3(b: At, state: Any) -> Any:
    return attnres(b, state, 3)


def attnres_in_one(b: At, state: Any) -> Any:
    return attnres(b, state, 100)


def read_and_normed(b: At, state: Any) -> Tensor:
    return b.N("final_norm", read(b, "read_out", state))


def bare(b: At, x: Tensor) -> Tensor:
    return x


def normed(b: At, x: Tensor) -> Tensor:
    return b.N("final_norm", x)


def summed(b: At, state: Any) -> Tensor:
    return state[0] + b.N("final_norm", state[1])


def normed_sum(b: At, state: Any) -> Tensor:
    return b.N("final_norm", b.N("norms_out.x", state[0]) + b.N("norms_out.y", state[1]))


class Scheme(NamedTuple):
    """What one entry of the registry must be, for 4 blocks.

    Attributes:
        equation: the state before a block -> the state after it.
        leave: the state after the last block -> what the head reads.
        norms: how many norms the placement has in each block, the last one's final norm included.
        init: the published default.
        qkv: norms on the projections, as letters; upper case: each over one head.
        inner: whether each sublayer norms before its output matrix.
        refuses: norm kinds under which it is not the published scheme.
    """

    equation: Callable[[At, Any], Any]
    leave: Callable[[At, Any], Tensor]
    norms: tuple[int, int, int, int]
    init: str = "plain"
    qkv: str = ""
    inner: bool = False
    refuses: tuple[str, ...] = ()


SCHEMES = {
    "prenorm": Scheme(prenorm, normed, (2, 2, 2, 3), "megatron"),
    "postnorm": Scheme(postnorm, bare, (2, 2, 2, 2)),
    "spannorm": Scheme(spannorm, bare, (3, 2, 2, 2), "scale_init"),
    "deepnorm": Scheme(deepnorm, bare, (2, 2, 2, 2), "deepnorm", refuses=("dyt", "derf", "none")),
    "b2t": Scheme(b2t, bare, (2, 2, 2, 2), "b2t", refuses=("none",)),
    "sandwich": Scheme(sandwich, normed, (4, 4, 4, 5), "megatron"),
    "perinorm": Scheme(perinorm, normed, (5, 4, 4, 5), "megatron"),
    "outputnorm": Scheme(outputnorm, normed, (2, 2, 2, 3), qkv="qk"),
    "hybridnorm": Scheme(hybridnorm, normed, (1, 1, 1, 2), "megatron", qkv="QKV"),
    "hybridnorm_star": Scheme(hybridnorm_star, normed, (2, 1, 1, 2), "megatron", qkv="QKV"),
    "mixln": Scheme(mixln, normed, (2, 2, 2, 3)),
    "lnscaling": Scheme(lnscaling, normed, (2, 2, 2, 3)),
    "subln": Scheme(prenorm, normed, (2, 2, 2, 3), "subln", inner=True),
    "residual": Scheme(residual, summed, (2, 2, 2, 3), refuses=("none",)),
    "keel": Scheme(keel, bare, (4, 4, 4, 4), refuses=("dyt", "derf", "none")),
    "siamesenorm": Scheme(siamesenorm, summed, (6, 6, 6, 7), refuses=("none",)),
    "rezero": Scheme(rezero, normed, (0, 0, 0, 1)),
    "attnres": Scheme(attnres, read_and_normed, (3, 4, 4, 6), "megatron", refuses=("none",)),
}
