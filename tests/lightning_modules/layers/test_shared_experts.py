"""Shared experts beside the routed ones: dense SwiGLUs on every token."""

import pytest
import torch

from tests.support import reference
from tests.support.moe import inputs, make_moe


@pytest.mark.parametrize("weighted", [False, True])
def test_they_see_every_token(weighted: bool) -> None:
    shared = {"num_shared_experts": 2, "shared_expert_dim": 12, "shared_expert_weighted_sum": weighted}
    layer, x = make_moe(**shared), inputs(2, 9)
    routed = make_moe()
    routed.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("shared")})
    gate, up, down = (layer.get_parameter(f"shared_expert.{name}_proj.weight") for name in ("gate", "up", "down"))
    assert gate.shape == (24, 32)
    of_one = [  # each of the two is a SwiGLU of its own, 12 wide
        reference.silu(x @ gate[part].T) * (x @ up[part].T) @ down[:, part].T for part in (slice(12), slice(12, 24))
    ]
    both, rest = of_one[0] + of_one[1], routed(x)[0]
    expected = both / 3 + rest * 2 / 3 if weighted else both + rest  # top-2
    torch.testing.assert_close(layer(x)[0], expected, atol=1e-5, rtol=1e-5)


def test_one_is_as_wide_as_a_routed_expert_unless_told_otherwise() -> None:
    layer = make_moe(num_shared_experts=1)  # of width 24, in a model whose dense layers are 48 wide
    assert layer.shared_expert is not None
    assert layer.shared_expert.up_proj.weight.shape == (24, 32)


def test_with_an_inner_norm_one_norm_spans_all_of_them() -> None:
    layer, x = make_moe(inner_norm=True, num_shared_experts=2), inputs(2, 9)
    weights = dict(layer.named_parameters())
    shared = {
        name.removeprefix("shared_expert."): w for name, w in weights.items() if name.startswith("shared_expert.")
    }
    gains = shared["inner_norm.weight"], weights["experts.mlp.inner_norm.weight"]
    assert [len(gain) for gain in gains] == [48, 24]
    of_all, of_each = (lambda h, gain=gain: reference.rms_norm(h, gain, 1e-5) for gain in gains)
    tokens = x.flatten(0, 1)
    expected = reference.swiglu(tokens, shared, of_all) + reference.moe(tokens, weights, 4, 2, inner=of_each)
    torch.testing.assert_close(layer(x)[0], expected.view_as(x), atol=1e-5, rtol=1e-4)
