"""Every scheme a second time: its equation as the paper prints it, and the numbers that follow from it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


class At(NamedTuple):
    """One block, as an equation sees it: number l of L, its sublayers, its norms and its other parameters by name."""

    l: int  # noqa: E741 - as in the papers
    L: int
    A: Callable[[Tensor], Tensor]
    F: Callable[[Tensor], Tensor]
    N: Callable[[str, Tensor], Tensor]
    gate: Tensor | None
    P: dict[str, Tensor]
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


EPS = 1e-5


def rms(x: Tensor) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def mixed(b: At, streams: Tensor, of_mapping: Callable[[At, str, Tensor], tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Streams [seq, n, dim] -> those after the block, token by token."""
    for at, f in (("attn", b.A), ("ffn", b.F)):
        pre, post, res = of_mapping(b, f"map_{at}", streams)
        x = torch.stack([sum(pre[t, i] * streams[t, i] for i in range(streams.size(1))) for t in range(len(streams))])  # type: ignore[misc]
        y = f(b.N(f"norm_{at}", x))
        streams = torch.stack([res[t] @ streams[t] + torch.outer(post[t], y[t]) for t in range(len(streams))])
    return streams


def copies(b: At, state: Tensor, n: int) -> Tensor:
    return torch.stack([state] * n, 1) if b.l == 1 else state


def of_hc(b: At, name: str, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As algorithm 2 has it: alpha [seq, n, 1 + n] is of the old streams, and R' = alpha^T R."""
    n, bias = streams.size(1), b.P[f"{name}.bias"]
    static_alpha = torch.cat((bias[:n, None], bias[2 * n :].view(n, n).T), 1)
    static_beta = bias[n : 2 * n]
    if f"{name}.phi" not in b.P:
        alpha, beta = static_alpha.expand(len(streams), n, 1 + n), static_beta.expand(len(streams), n)
    else:
        th = b.P[f"{name}.phi"]
        alpha_fn, beta_fn = torch.stack((th[0], *th[2:]), 1), th[1]
        alpha_scale, beta_scale = b.P[f"{name}.scale"]
        normed = streams / rms(streams)
        alpha = torch.tanh(normed @ alpha_fn) * alpha_scale + static_alpha
        beta = torch.tanh(normed @ beta_fn) * beta_scale + static_beta
    return alpha[:, :, 0], beta, alpha[:, :, 1:].mT


def hc(b: At, state: Tensor, n: int = 4) -> Tensor:
    return mixed(b, copies(b, state, n), of_hc)


def sinkhorn_knopp(logits: Tensor, iterations: int) -> Tensor:
    """One matrix [n, n]: columns divided by their sums, then rows."""
    m = logits.exp()
    for _ in range(iterations):
        m = m @ torch.diag(1 / m.sum(0))
        m = torch.diag(1 / m.sum(1)) @ m
    return m


def of_mhc(b: At, name: str, streams: Tensor, iterations: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    n, v = streams.size(1), streams.flatten(1)
    h = (v / rms(v)) @ b.P[f"{name}.phi"].T
    a, bias = b.P[f"{name}.scale"], b.P[f"{name}.bias"]
    pre, post = sigmoid(a[0] * h[:, :n] + bias[:n]), 2 * sigmoid(a[1] * h[:, n : 2 * n] + bias[n : 2 * n])
    if len(a) == 2:
        return pre, post, torch.eye(n, dtype=streams.dtype).expand(len(streams), n, n)
    logits = (a[2] * h[:, 2 * n :] + bias[2 * n :]).unflatten(1, (n, n))
    return pre, post, torch.stack([sinkhorn_knopp(matrix, iterations) for matrix in logits])


def mhc(b: At, state: Tensor, n: int = 4, iterations: int = 20) -> Tensor:
    return mixed(b, copies(b, state, n), partial(of_mhc, iterations=iterations))


def gr(b: At, state: Tensor, n: int = 4) -> Tensor:
    streams = copies(b, state, n)
    for at, f in (("map_attn", b.A), ("map_ffn", b.F)):
        hat = torch.stack([b.N(f"{at}.norms.{i}", streams[:, i]) for i in range(n)], 1)
        inner = hat.flatten(1) @ b.P[f"{at}.down"].T / n
        gates = sigmoid((inner * sigmoid(inner)) @ b.P[f"{at}.up"].T).view_as(hat)
        weights = 2 * sigmoid(hat.flatten(1) @ b.P[f"{at}.weigh"].T / n)
        y = f((gates * hat).sum(1) / n)
        streams = streams + weights[:, :, None] * y[:, None]
    return streams


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


def streams_summed(b: At, state: Tensor) -> Tensor:
    return b.N("final_norm", state.sum(1))


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
    "hc": Scheme(hc, streams_summed, (2, 2, 2, 3), "megatron"),
    "mhc": Scheme(mhc, streams_summed, (2, 2, 2, 3), "megatron"),
    "ihc": Scheme(mhc, streams_summed, (2, 2, 2, 3), "megatron"),
    "gr": Scheme(gr, streams_summed, (8, 8, 8, 9), "megatron"),
    "attnres": Scheme(attnres, read_and_normed, (3, 4, 4, 6), "megatron", refuses=("none",)),
}
