"""Attention and RoPE against a loop over heads, and the properties that the loop does not show."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.layers.attention import Attention
from lightning_modules.layers.rope import rope_tables, rotate
from spannorm import QKVNorm
from tests.support import reference
from tests.support.models import tiny_config

CPU = torch.device("cpu")
EPS, THETA = 1e-5, 300.0


def make_attention(
    num_kv_heads: int = 4, qkv_norm: QKVNorm | None = None, inner_norm: bool = False, **config: Any
) -> Attention:
    layer = Attention(tiny_config(num_kv_heads=num_kv_heads, norm_eps=EPS, **config), qkv_norm, inner_norm)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(std=0.3)
    return layer


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("qkv_norm", "inner_norm"),
    [
        (None, False),
        (QKVNorm("qk", per_head=True), False),
        (QKVNorm("qk", per_head=False), False),
        (QKVNorm("qkv", per_head=True), False),
        (QKVNorm("qkv", per_head=False), True),
    ],
    ids=str,
)
def test_attention_equals_a_loop_over_heads(qkv_norm: QKVNorm | None, inner_norm: bool, num_kv_heads: int) -> None:
    layer, x = make_attention(num_kv_heads, qkv_norm, inner_norm), torch.randn(2, 9, 32)
    weights = dict(layer.named_parameters())
    norms: dict[str, Callable[[Tensor], Tensor]] = {
        name: partial(reference.rms_norm, gain=weights[f"projection_norms.{name}.weight"], eps=EPS)
        for name in (qkv_norm.on if qkv_norm else "")
    }
    inner = partial(reference.rms_norm, gain=weights["inner_norm.weight"], eps=EPS) if inner_norm else lambda h: h
    per_head = qkv_norm is not None and qkv_norm.per_head
    expected = torch.stack(
        [reference.attention(sequence, weights, 4, num_kv_heads, THETA, norms, per_head, inner) for sequence in x]
    )
    torch.testing.assert_close(layer(x, rope_tables(9, 8, THETA, CPU)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rotary", [True, False])
def test_attention_that_is_not_causal_sees_all_keys(rotary: bool) -> None:
    layer, x = make_attention(2, causal=False, bias=True), torch.randn(2, 9, 32)
    rope, theta = (rope_tables(9, 8, THETA, CPU), THETA) if rotary else (None, None)
    weights = dict(layer.named_parameters())
    expected = torch.stack([reference.attention(row, weights, 4, 2, theta, causal=False) for row in x])
    torch.testing.assert_close(layer(x, rope), expected, atol=1e-5, rtol=1e-5)
    assert layer.logits(x, rope).isfinite().all()


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("qkv_norm", [None, QKVNorm("qk", per_head=True), QKVNorm("qkv", per_head=False)], ids=str)
def test_logits_are_those_of_the_forward_pass(qkv_norm: QKVNorm | None, num_kv_heads: int) -> None:
    layer, x, rope = make_attention(num_kv_heads, qkv_norm), torch.randn(2, 9, 32), rope_tables(9, 8, THETA, CPU)
    values = layer.v_proj(x)
    if "v" in layer.projection_norms:
        values = layer.projection_norms["v"](values)
    weights = layer.logits(x, rope).softmax(-1)
    heads = [weights[:, n] @ values.unflatten(-1, (-1, 8))[:, :, n * num_kv_heads // 4] for n in range(4)]
    torch.testing.assert_close(layer.o_proj(torch.cat(heads, dim=-1)), layer(x, rope), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("declared", [None, QKVNorm("qk", per_head=False), QKVNorm("qkv", per_head=True)], ids=str)
@pytest.mark.parametrize("qk_norm", ["head", "width"])
def test_the_configured_norms_stand_before_rope_in_the_place_of_declared_ones(
    qk_norm: str, declared: QKVNorm | None
) -> None:
    layer = make_attention(2, declared, qk_norm=qk_norm, qkv_bias=True, head_dim=6)
    x, weights = torch.randn(2, 9, 32), dict(layer.named_parameters())
    letters = "qkv" if declared is not None and "v" in declared.on else "qk"
    assert set(layer.projection_norms) == set(letters)
    norms: dict[str, Callable[[Tensor], Tensor]] = {
        name: partial(reference.rms_norm, gain=weights[f"projection_norms.{name}.weight"], eps=EPS) for name in letters
    }
    per_head = {"q": qk_norm == "head", "k": qk_norm == "head", "v": True}
    expected = torch.stack([reference.attention(s, weights, 4, 2, THETA, norms, per_head) for s in x])
    torch.testing.assert_close(layer(x, rope_tables(9, 6, THETA, CPU)), expected, atol=1e-5, rtol=1e-5)


def test_biases_start_at_0_and_norms_at_1() -> None:
    layer = Attention(tiny_config(qkv_bias=True, qk_norm="head"))
    ones = {"projection_norms.q.weight", "projection_norms.k.weight"}
    found = {name: parameter for name, parameter in layer.named_parameters() if parameter.dim() == 1}
    assert found.keys() == {*ones, *(f"{letter}_proj.bias" for letter in "qkv")}
    assert all(torch.equal(p, torch.full_like(p, float(name in ones))) for name, p in found.items())


def test_a_position_sees_itself_and_the_past_only() -> None:
    layer, x, rope = make_attention(), torch.randn(1, 9, 32), rope_tables(9, 8, THETA, CPU)
    changed = x.clone()
    changed[:, 5] += 1
    difference = (layer(x, rope) - layer(changed, rope)).abs().amax(dim=(0, 2))
    assert (difference[:5] == 0).all()
    assert (difference[5:] > 1e-4).all()


def test_grouped_queries_equal_repeated_key_and_value_heads() -> None:
    grouped, full = make_attention(num_kv_heads=2), make_attention(num_kv_heads=4)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x, rope = torch.randn(2, 9, 32), rope_tables(9, 8, THETA, CPU)
    torch.testing.assert_close(grouped(x, rope), full(x, rope))


def test_rotated_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 8)
    rope = rope_tables(64, 8, THETA, CPU)
    turned_q, turned_k = (rotate(vector.expand(1, 1, 64, 8), rope)[0, 0] for vector in (q, k))
    products = turned_q @ turned_k.T  # [position of q, position of k]
    for distance in range(-20, 20):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert products[0].std() > 0.1
    torch.testing.assert_close(turned_q[0], q)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(64))


def test_rotation_keeps_the_dtype() -> None:
    rope = rope_tables(4, 8, THETA, CPU)
    assert rope[0].dtype == torch.float32
    assert rotate(torch.randn(1, 1, 4, 8, dtype=torch.bfloat16), rope).dtype == torch.bfloat16
