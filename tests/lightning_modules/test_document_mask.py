"""Packed documents: what a document's logits are does not depend on what else is in the sequence."""

from functools import partialmethod
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.samples import positions
from lightning_modules.layers.attention import Attention
from lightning_modules.layers.document_mask import attend, document_mask
from lightning_modules.layers.rope import at_positions, rope_tables
from lightning_modules.transformer import Transformer
from spannorm import PLACEMENTS
from tests.support.devices import DEVICES
from tests.support.models import VOCAB_SIZE, make_module, tiny_config, tokens

LENGTHS = [[5, 1, 9, 3], [18]]  # of the documents in two sequences


def packed_positions(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


@pytest.mark.parametrize("ffn", ["dense", "moe"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_logits_of_a_packed_document_are_those_of_the_document_alone(placement: str, ffn: str) -> None:
    module = make_module(placement=placement, ffn=ffn, num_kv_heads=2).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # rezero's branches start closed
            parameter.add_(0.3 * (parameter == 0))
    sequences = tokens(2, 18)
    packed, _ = module(sequences, packed_positions(LENGTHS))
    for row, logits, lengths in zip(sequences, packed, LENGTHS, strict=True):
        pieces = zip(row.split(lengths), logits.split(lengths), strict=True)
        for alone, inside in pieces:
            torch.testing.assert_close(inside, module(alone[None])[0][0], atol=1e-5, rtol=1e-5)
    if len(LENGTHS[0]) > 1:  # and without positions they are not
        assert not torch.allclose(module(sequences)[0][0, 5:], packed[0, 5:], atol=1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch looks at it while it traces
@pytest.mark.parametrize(
    "options", [pytest.param({"compile": True}, marks=pytest.mark.slow), {"activation_checkpointing": True}], ids=str
)
def test_compiled_and_checkpointed_it_is_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    plain, other = make_module(), make_module(**options)
    other.load_state_dict(plain.state_dict())
    sequences, places = tokens(2, 18), packed_positions(LENGTHS)
    for module in (plain, other):
        module(sequences, places)[0].square().mean().backward()
    for ours, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_without_causality_a_document_sees_all_of_itself_and_nothing_else() -> None:
    model = Transformer(tiny_config(causal=False, num_layers=1), VOCAB_SIZE).eval()
    text = tokens(1, 8)
    together = model(text, packed_positions([[5, 3]]))[0]
    apart = [model(part)[0] for part in (text[:, :5], text[:, 5:])]
    torch.testing.assert_close(together, torch.cat(apart, dim=1), atol=1e-5, rtol=1e-5)
    changed = text.clone()
    changed[0, 4] = (changed[0, 4] + 1) % VOCAB_SIZE
    seen = (model(changed, packed_positions([[5, 3]]))[0] != together).any(-1)[0]
    assert seen.tolist() == [True] * 5 + [False] * 3


def attend_both_ways(device: str, dtype: torch.dtype, backward: bool, causal: bool = True) -> list[list[Tensor]]:
    """[output and, if wanted, input gradient] by FlexAttention, and the same by the mask."""
    config = tiny_config(dim=64, num_heads=4, num_kv_heads=2, causal=causal)
    attention = Attention(config).to(device, dtype).requires_grad_(backward)
    places = packed_positions([[100, 28, 128], [1, 255]]).to(device)
    rope = at_positions(rope_tables(256, config.head_width, 1e4, torch.device(device)), places)
    x, results = torch.randn(2, 256, 64, device=device, dtype=dtype), []
    for flex in (True, False):
        call = torch.compile(attention) if flex and device == "cuda" else attention
        inputs = x.clone().requires_grad_(backward)
        out = call(inputs, rope, document_mask(places, flex, causal))
        gradients = torch.autograd.grad(out.float().square().sum(), inputs) if backward else ()
        results.append([out.detach(), *gradients])
    return results


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize("causal", [True, False])
def test_flex_attention_is_the_same_as_the_mask(causal: bool) -> None:
    """Forward only: on a CPU it has no backward pass."""
    for ours, theirs in zip(*attend_both_ways("cpu", torch.float32, backward=False, causal=causal), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
def test_compiled_flex_attention_is_the_same_as_the_mask() -> None:
    for ours, theirs in zip(*attend_both_ways("cuda", torch.bfloat16, backward=True), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-2, rtol=5e-2)


def test_positions_count_from_the_last_end_of_document() -> None:
    rows = np.array([[7, 0, 5, 5, 0, 0, 3], [0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
    expected = [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6]]
    assert positions(rows, end_of_document=0).tolist() == expected
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, (50, 40))
    for row, places in zip(rows, positions(rows, end_of_document=3), strict=True):
        expected_row = [0]
        for token in row[:-1].tolist():
            expected_row.append(0 if token == 3 else expected_row[-1] + 1)
        assert places.tolist() == expected_row


class AsIfOnGPU(Tensor):
    is_cuda = True


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_flex_attention_is_chosen_on_a_gpu_and_compiled_only(
    compiled: bool, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []

    def note(positions: Tensor, flex: bool, causal: bool) -> Tensor:
        chosen.append(flex)
        mask = document_mask(positions, flex=False)
        assert isinstance(mask, Tensor)
        return mask

    monkeypatch.setattr("lightning_modules.transformer.document_mask", note)
    model = Transformer(tiny_config(compile=compiled), VOCAB_SIZE)  # a module compiles it, not the model itself
    sequences = tokens(2, 18)
    model(sequences.as_subclass(AsIfOnGPU) if on_gpu else sequences, packed_positions(LENGTHS))
    assert chosen == [compiled and on_gpu]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_cudnn_is_left_out_where_a_mask_is_trained_with(
    on_gpu: bool, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient may be NaN. All else is as it was, and so are the switches afterwards."""
    seen, plain = [], F.scaled_dot_product_attention

    def note(*tensors: Tensor, **options: Any) -> Tensor:
        backends = torch.backends.cuda
        seen.append((backends.cudnn_sdp_enabled(), backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled()))
        return plain(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    mask = document_mask(packed_positions([[5, 3]]), flex=False)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with torch.set_grad_enabled(trained):
        attend(q.as_subclass(AsIfOnGPU) if on_gpu else q, k, v, mask, grouped=False)
    assert seen == [(before and not (on_gpu and trained), True, True)]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_finite_at_64_mod_128_far_below_zero(device: str) -> None:
    """Logits of -120, which cuDNN's gradient turned into NaN on an H100 (pytorch/pytorch, issue 196678)."""
    q, k, v = (torch.randn(1, 1, 192, 64, device=device, dtype=torch.bfloat16) * scale for scale in (0.1, 0.1, 1.0))
    q[..., 0], k[..., 0] = 1.0, -120 * 8.0
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = attend(q, k, v, document_mask(packed_positions([[100, 92]]).to(device), flex=False), grouped=False)
    gradients = torch.autograd.grad(out.float().square().sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
