"""The layers' equations written down a second time, slowly and from their weights alone."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * gain


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def swiglu(x: Tensor, weights: dict[str, Tensor], inner: Callable[[Tensor], Tensor] = lambda h: h) -> Tensor:
    """x [..., dim]; weights by the names that FeedForward gives them."""
    gate, up = (x @ weights[f"{name}_proj.weight"].T + weights.get(f"{name}_proj.bias", 0.0) for name in ("gate", "up"))
    return inner(silu(gate) * up) @ weights["down_proj.weight"].T + weights.get("down_proj.bias", 0.0)


def mlp(x: Tensor, weights: dict[str, Tensor], inner: Callable[[Tensor], Tensor] = lambda h: h) -> Tensor:
    """down(gelu(up x)), where gelu(z) = z Phi(z). x [..., dim]; weights by the names that MLP gives them."""
    hidden = x @ weights["up_proj.weight"].T + weights.get("up_proj.bias", 0.0)
    hidden = hidden * torch.distributions.Normal(0.0, 1.0).cdf(hidden)
    return inner(hidden) @ weights["down_proj.weight"].T + weights.get("down_proj.bias", 0.0)


def turn(x: Tensor, theta: float) -> Tensor:
    """RoPE as complex rotation of the pairs (i, i + width / 2). x [seq, width]."""
    seq, width = x.shape
    frequencies = torch.tensor([theta ** (-2 * i / width) for i in range(width // 2)])
    angles = torch.arange(seq)[:, None] * frequencies
    turned = torch.complex(x[:, : width // 2], x[:, width // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def attention(
    x: Tensor,
    weights: dict[str, Tensor],
    num_heads: int,
    num_kv_heads: int,
    theta: float | None,
    norms: dict[str, Callable[[Tensor], Tensor]] | None = None,
    per_head: bool | dict[str, bool] = True,
    inner: Callable[[Tensor], Tensor] = lambda h: h,
    causal: bool = True,
) -> Tensor:
    """Attention of one sequence, a loop over its heads.

    Args:
        x: [seq, dim].
        weights: by the names that Attention gives them; biases where there are some.
        theta: base of the rotation; None: nothing is rotated.
        norms: of q, k and v, before the rotation, each over one head (per_head, of all or of each) or the whole
            projection.
        inner: norm before the output projection.
        causal: a query sees no later keys.
    """
    q, k, v = (x @ weights[f"{name}_proj.weight"].T + weights.get(f"{name}_proj.bias", 0.0) for name in "qkv")
    each_head = per_head if isinstance(per_head, dict) else dict.fromkeys("qkv", per_head)
    whole = {name: norm for name, norm in (norms or {}).items() if not each_head[name]}
    norms = {name: norm for name, norm in (norms or {}).items() if each_head[name]}
    q, k, v = (whole.get(name, lambda h: h)(h) for name, h in (("q", q), ("k", k), ("v", v)))
    width, future = q.size(1) // num_heads, torch.ones(len(x), len(x)).triu(1).bool()
    outputs = []
    for head in range(num_heads):
        mine, shared = head, head // (num_heads // num_kv_heads)
        q_head, k_head, v_head = (
            norms.get(name, lambda h: h)(h[:, index * width : (index + 1) * width])
            for name, h, index in (("q", q, mine), ("k", k, shared), ("v", v, shared))
        )
        q_head, k_head = (h if theta is None else turn(h, theta) for h in (q_head, k_head))
        scores = q_head @ k_head.T / math.sqrt(width)
        scores = scores.masked_fill(future, -math.inf) if causal else scores
        outputs.append(scores.softmax(dim=-1) @ v_head)
    return inner(torch.cat(outputs, dim=-1)) @ weights["o_proj.weight"].T + weights.get("o_proj.bias", 0.0)


def moe(
    x: Tensor,
    weights: dict[str, Tensor],
    num_experts: int,
    top_k: int,
    normalize: bool = True,
    inner: Callable[[Tensor], Tensor] = lambda h: h,
) -> Tensor:
    """Every expert on every token, weighted by a gate that is zero outside the token's top k.

    Args:
        x: [tokens, dim].
        weights: by the names that MoE gives them.
    """
    w1, v1, w2 = (weights[f"experts.mlp.{name}"].chunk(num_experts) for name in ("w1", "v1", "w2"))
    scores = (x @ weights["router.layer.weight"].T).softmax(dim=-1)
    threshold = scores.sort(dim=-1, descending=True).values[:, top_k - 1 : top_k]
    gates = scores * (scores >= threshold)
    if normalize:
        gates = gates / gates.sum(dim=-1, keepdim=True)
    experts = [inner(silu(x @ w1[e].T) * (x @ v1[e].T)) @ w2[e] for e in range(num_experts)]
    return sum((gates[:, e : e + 1] * out for e, out in enumerate(experts)), torch.zeros_like(x))
