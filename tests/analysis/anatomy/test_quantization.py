"""Fake quantization against torchao where it is installed, and against plain formulas, row by row."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from analysis.anatomy.fake_quantization import fake_quantization, round_to_bits
from analysis.anatomy.forward import target_losses
from analysis.anatomy.held_out import HeldOut
from analysis.anatomy.quantization import Quantization
from core.errors import ConfigError
from lightning_modules.layers.moe import MoE
from lightning_modules.transformer import Transformer
from spannorm import PLACEMENTS
from tests.support import reference
from tests.support.anatomy import inputs_of, make_text, trained_like


def rounded(row: list[float], bits: int) -> list[float]:
    """A list of numbers on the grid of so many bits, in Python's own arithmetic; ties go to the even one."""
    most = (1 << bits - 1) - 1
    step = max(map(abs, row)) / most
    return [round(value / step) * step if step else 0.0 for value in row]


def by_rows(x: Tensor, bits: int) -> Tensor:
    rows = [rounded(row, bits) for row in x.double().flatten(0, -2).tolist()]
    return torch.tensor(rows, dtype=torch.float64).view(x.shape).float()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_against_a_plain_formula(bits: int) -> None:
    x = torch.randn(40, 9)
    x[3] = 0.0
    torch.testing.assert_close(round_to_bits(x, bits), by_rows(x, bits))
    torch.testing.assert_close(round_to_bits(x, bits, dim=0), by_rows(x.T, bits).T)
    assert len({round(float(value), 5) for value in round_to_bits(x[0], bits)}) <= 2**bits - 1


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_against_torchao(bits: int) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x, most = torch.randn(64, 48), 2 ** (bits - 1) - 1
    limits = {"target_dtype": torch.int8, "quant_min": -most, "quant_max": most}
    symmetric = primitives.MappingType.SYMMETRIC
    scale, zero = primitives.choose_qparams_affine(x, symmetric, (1, 48), eps=1e-12, **limits)
    whole = primitives.quantize_affine(x, (1, 48), scale, zero, torch.int8, -most, most)
    expected = primitives.dequantize_affine(whole, (1, 48), scale, zero, torch.int8, -most, most)
    torch.testing.assert_close(round_to_bits(x, bits), expected)


class RoundedLinear(nn.Module):
    """A linear layer whose weight and input are rounded by the plain formula."""

    def __init__(self, linear: nn.Linear, weight_bits: int | None, activation_bits: int | None) -> None:
        super().__init__()
        self.weight, self.bias, self.bits = linear.weight.detach(), linear.bias, activation_bits
        if weight_bits is not None:
            self.weight = by_rows(self.weight, weight_bits)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.bits is None else by_rows(x, self.bits)
        out = x @ self.weight.T
        return out if self.bias is None else out + self.bias


def by_hand(model: Transformer, weight_bits: int | None, activation_bits: int | None) -> Transformer:
    """A copy whose every linear layer in attention and FFN is a RoundedLinear."""
    changed = copy.deepcopy(model)
    for block in changed.blocks:
        for part in (block.attn, block.ffn):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, RoundedLinear(layer, weight_bits, activation_bits))
    return changed


def losses_of(model: Transformer, text: HeldOut) -> Tensor:
    with torch.no_grad():
        return torch.cat([target_losses(model, batch) for batch in text])


@pytest.mark.parametrize("fields", [{"placement": "prenorm"}, {"placement": "subln", "qkv_bias": True}])
def test_the_loss_against_layers_rounded_by_hand(fields: dict[str, Any]) -> None:
    model, text = trained_like(num_layers=2, **fields), make_text()
    exact = losses_of(model, text)
    found = Quantization()(model, text)
    for name, weight_bits, activation_bits in (("w8a8", 8, 8), ("w4a16", 4, None), ("w4a4", 4, 4)):
        expected = losses_of(by_hand(model, weight_bits, activation_bits), text)
        with fake_quantization(model, weight_bits, activation_bits):
            losses = losses_of(model, text)
        # In a few tokens the last bit of a sum decides a rounding.
        assert torch.isclose(losses, expected, atol=1e-3).float().mean() > 0.9, name
        assert (expected - exact).abs().mean() > 10 * (losses - expected).abs().mean(), name
        assert found.scalars[name] == pytest.approx((losses - exact).mean().item(), abs=1e-5)
        assert found.by_document[name].sum() / text.num_targets == pytest.approx(found.scalars[name])


def test_sixteen_bits_are_not_rounded_at_all() -> None:
    model, text = trained_like(num_layers=2), make_text(1)
    exact, nearly = (
        Quantization(schemes=(scheme,))(model, text).by_document[scheme] for scheme in ("w16a16", "w15a15")
    )
    assert (exact == 0).all()
    assert (nearly != 0).any()


def experts_by_hand(layer: MoE, x: Tensor, bits: int) -> Tensor:
    """A mixture on rounded inputs, weights and hidden features; its router reads what is not rounded."""
    weights = {name: value.detach() for name, value in layer.named_parameters()}
    for name in ("w1", "v1"):
        weights[f"experts.mlp.{name}"] = by_rows(weights[f"experts.mlp.{name}"], bits)
    downs = weights["experts.mlp.w2"].chunk(4)
    weights["experts.mlp.w2"] = torch.cat([by_rows(down.T, bits).T for down in downs])
    # The reference has one input for all: the router's weight is made to read the exact one beside the rounded one.
    width = x.size(1)
    both = torch.cat((by_rows(x, bits), x), dim=1)
    zeros = torch.zeros_like(weights["router.layer.weight"])
    weights["router.layer.weight"] = torch.cat((zeros, weights["router.layer.weight"]), dim=1)
    for name in ("w1", "v1"):
        wide = weights[f"experts.mlp.{name}"]
        weights[f"experts.mlp.{name}"] = torch.cat((wide, torch.zeros_like(wide)), dim=1)
    down = weights["experts.mlp.w2"]
    weights["experts.mlp.w2"] = torch.cat((down, torch.zeros_like(down)), dim=1)
    return reference.moe(both, weights, 4, 2, inner=lambda h: by_rows(h, bits))[:, :width]


def test_experts_are_rounded_as_any_other_matrix() -> None:
    """Also their down matrices, which are stored the other way round."""
    model = trained_like(num_layers=1, ffn="moe")
    layer, x = model.blocks[0].ffn, torch.randn(20, 32)
    assert isinstance(layer, MoE)
    with torch.no_grad(), fake_quantization(model, 4, 4):
        out, _ = layer(x)
    expected = experts_by_hand(layer, x, 4)
    close = torch.isclose(out, expected, rtol=1e-3, atol=1e-4)
    assert close.float().mean() > 0.97, "a sum's last bit may decide a rounding"
    exact, _ = layer(x)
    assert not torch.isclose(exact, expected, rtol=1e-3, atol=1e-4).float().mean() > 0.2


@pytest.mark.parametrize(("ends", "tied"), [(False, False), (True, False), (True, True)])
def test_what_is_rounded_and_what_is_not(ends: bool, tied: bool) -> None:
    """And that all is as it was afterwards, to the bit."""
    model = trained_like(num_layers=2, ffn="moe", tie_embeddings=tied, qkv_bias=True, moe={"num_shared_experts": 1})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounded_parts = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "w1", "v1", "w2")
    rounded_parts += ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    rounded_parts += ("embedding.weight", "head.weight") if ends else ()
    with fake_quantization(model, 4, 4, ends):
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) != name.endswith(rounded_parts), name
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_head_reads_rounded_activations_where_ends_are_too() -> None:
    model, text = trained_like(num_layers=1), make_text(1)
    with torch.no_grad(), fake_quantization(model, None, 3, ends=True):
        losses = target_losses(model, text.batches[0])
    changed = by_hand(model, None, 3)
    state: list[Tensor] = []
    changed.blocks[-1].register_forward_hook(lambda module, inputs, output: state.append(output[0]))
    with torch.no_grad():
        changed(inputs_of(text.batches[0]))
        logits = by_rows(state[0], 3) @ model.head.weight.T
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), text.batches[0].targets.flatten())
    assert losses.mean().item() == pytest.approx(expected.item(), abs=2e-3)


@pytest.mark.parametrize("placement", sorted(PLACEMENTS))
def test_every_placement_can_be_rounded(placement: str) -> None:
    found = Quantization(schemes=("w4a4",))(trained_like(placement=placement, num_layers=2), make_text(1))
    assert math.isfinite(found.scalars["w4a4"])
    assert found.scalars["w4a4"] != 0


@pytest.mark.parametrize("schemes", [(), ("w8",), ("w1a8",), ("w8a17",), ("int8",)])
def test_schemes_that_are_none_are_refused(schemes: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"schemes=.* is not valid: expected schemes as w4a8: bits of weights"):
        Quantization(schemes=schemes)
