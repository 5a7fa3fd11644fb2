"""Masked tokens: which, how they look, what the loss is of them, and that the model sees both sides."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import ConfigError
from datamodules.order import _mix
from lightning_modules import language_module
from lightning_modules.initialization import initialize
from lightning_modules.masked_language_module import MaskedLanguageModule
from lightning_modules.masked_transformer import MaskedTransformer, mixed
from lightning_modules.source_loss import SourceLoss
from lightning_modules.transformer import Transformer
from tests.support.fitting import fit
from tests.support.models import VOCAB_SIZE, tiny_config, tiny_values, tokens


def make_model(rate: float = 0.15, **overrides: Any) -> MaskedTransformer:
    model = MaskedTransformer(tiny_config(causal=False, **overrides), VOCAB_SIZE + 1, rate, VOCAB_SIZE)
    initialize(model)
    return model


def make_module(**overrides: Any) -> MaskedLanguageModule:
    module = MaskedLanguageModule(tiny_values(causal=False, **overrides), {"warmup_steps": 0}, VOCAB_SIZE)
    module.configure_model()
    return module


def test_the_hash_is_that_of_the_datas_order() -> None:
    x = torch.randint(-(2**62), 2**62, (1000,))
    with np.errstate(over="ignore"):
        expected = _mix(x.numpy().view(np.uint64)).view(np.int64)
    assert np.array_equal(mixed(x).numpy(), expected)


def test_a_share_of_the_tokens_is_chosen_and_most_of_them_masked() -> None:
    model, text = make_model(0.15), tokens(200, 100)
    masked = model.mask(text)
    assert masked.at.shape == (200, 15)
    assert all(len(set(row)) == 15 for row in masked.at.tolist())
    assert torch.equal(masked.targets, text.gather(1, masked.at))
    shown = masked.tokens.gather(1, masked.at)
    hidden, same = (shown == VOCAB_SIZE).double().mean(), (shown == masked.targets).double().mean()
    assert float(hidden) == pytest.approx(0.8, abs=0.03)
    assert float(same) == pytest.approx(0.1 + 0.1 / VOCAB_SIZE, abs=0.02)
    assert len(shown.unique()) == VOCAB_SIZE + 1
    elsewhere = torch.ones_like(text, dtype=torch.bool).scatter(1, masked.at, False)
    assert torch.equal(masked.tokens[elsewhere], text[elsewhere])
    counts = masked.at.flatten().bincount(minlength=100)
    assert counts.min() > 10, "any position may be"
    assert counts.max() < 55


def test_what_is_chosen_follows_from_text_and_step_alone() -> None:
    model, text = make_model(), tokens(8, 40)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = model.mask(text, step=3)
    assert torch.equal(torch.get_rng_state(), before)
    for row in range(8):  # whatever stands beside it
        for whole, alone in zip(first, model.mask(text[row : row + 1], step=3), strict=True):
            assert torch.equal(whole[row], alone[0])
    assert not torch.equal(model.mask(text, step=4).at, first.at)
    assert len({tuple(row) for row in first.at.tolist()}) == 8, "each text has its own"


@pytest.mark.parametrize("tied", [False, True])
def test_flops_count_the_head_where_a_token_is_asked_for(tied: bool) -> None:
    """A position of a hundred with rate 0.01, so of a text of a hundred tokens one row of logits."""
    rare, often = (make_model(rate, tie_embeddings=tied).flops_per_token(100) for rate in (0.01, 0.51))
    head = (VOCAB_SIZE + 1) * tiny_config().dim
    assert often - rare == pytest.approx(6 * head / 2, rel=1e-3)
    causal = Transformer(tiny_config(tie_embeddings=tied), VOCAB_SIZE + 1).flops_per_token(100)
    assert causal - rare == pytest.approx(6 * head * 0.99, rel=1e-2)


@pytest.mark.parametrize("large", [False, True])
def test_the_loss_is_that_of_what_was_taken_out(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_module, "LARGE_VOCABULARY", 1 if large else 10**9)
    module, batch = make_module(), {"tokens": tokens(3, 21)}
    model = module.model
    assert model is not None
    masked = model.mask(batch["tokens"][:, :-1])
    every = model(masked.tokens)[0].log_softmax(-1)
    picked = torch.stack([every[row, masked.at[row], masked.targets[row]] for row in range(3)])
    loss, _ = module.compute_loss(batch)
    torch.testing.assert_close(loss, -picked.mean())
    torch.testing.assert_close(model.loss(batch, chunked=large), loss)
    torch.testing.assert_close(module.predict_step(batch, 0), picked)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_documents_of_a_sequence_do_not_see_each_other() -> None:
    module, text, places = make_module().eval(), tokens(1, 21), torch.cat([torch.arange(9), torch.arange(11)])[None]
    batch = {"tokens": text, "positions": places}
    model = module.model
    assert model is not None
    masked = model.mask(text[:, :-1])
    apart = torch.cat([model(piece[None])[0][0].log_softmax(-1) for piece in masked.tokens[0].split([9, 11])])
    picked = apart[masked.at[0], masked.targets[0]]
    torch.testing.assert_close(module.predict_step(batch, 0)[0], picked, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.compute_loss(batch)[0], -picked.mean(), atol=1e-5, rtol=1e-5)


def test_monitors_see_what_training_sees() -> None:
    model, batch = make_model().eval(), {"tokens": tokens(2, 21)}
    seen: list[torch.Tensor] = []
    model.embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.observe(batch)
    assert torch.equal(seen[0], model.mask(batch["tokens"][:, :-1]).tokens)


@pytest.mark.parametrize("large", [False, True])
def test_losses_of_sources_are_those_of_their_sequences(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_module, "LARGE_VOCABULARY", 1 if large else 10**9)
    module, batch = make_module(), {"tokens": tokens(4, 21), "source": torch.tensor([0, 1, 1, 0])}
    sources = SourceLoss(("a", "b"), "val/loss")
    module.compute_loss(batch, sources)
    expected = -module.predict_step(batch, 0).mean(1)
    found = sources.compute()
    assert float(found["val/loss/a"]) == pytest.approx(float(expected[[0, 3]].mean()), rel=1e-5)
    assert float(found["val/loss/b"]) == pytest.approx(float(expected[[1, 2]].mean()), rel=1e-5)


def test_it_sees_both_sides() -> None:
    model, text = make_model(), tokens(1, 9)
    logits = model(text)[0]
    for place in (0, 8):
        other = text.clone()
        other[0, place] = (other[0, place] + 1) % VOCAB_SIZE
        assert ((model(other)[0] - logits).abs().amax(-1) > 1e-7).all()


def test_validation_always_asks_the_same_and_training_does_not(tmp_path: Path) -> None:
    module, batch = make_module(), {"tokens": tokens(4, 31)}
    losses = [module.held_out_step(batch)[0] for _ in range(2)]
    assert torch.equal(*losses)
    assert module.held_out_step(batch)[1] == 4 * round(0.15 * 30)
    seen = []
    model = module.model
    assert model is not None
    mask = model.mask
    model.mask = lambda text, step=0: seen.append(step) or mask(text, step)  # type: ignore[method-assign,func-returns-value]
    fit(tmp_path, module, tokens(4, 31), tokens(4, 31), max_steps=2, logger=False)
    assert seen == [1, 2]


@pytest.mark.parametrize(
    ("model", "rate", "message"),
    [
        ({"causal": True}, 0.15, r"model\.causal=True is not valid: expected false: masked"),
        ({}, 0.0, r"module\.mask_rate=0\.0"),
        ({}, 1.0, r"module\.mask_rate=1\.0"),
        ({"vocab_size": VOCAB_SIZE}, 0.15, rf"model\.vocab_size={VOCAB_SIZE} .* at least {VOCAB_SIZE + 1}"),
    ],
)
def test_what_cannot_be_is_refused(model: dict[str, Any], rate: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MaskedLanguageModule(tiny_values(**{"causal": False, **model}), {}, VOCAB_SIZE, rate)


def test_it_generates_nothing() -> None:
    with pytest.raises(ConfigError, match=r"model\.causal=False is not valid: expected true with a cache"):
        make_module().eval().generate([1, 2, 3], 2, 0.0, 0, 16)


def test_the_mask_rate_is_in_the_checkpoint() -> None:
    module = MaskedLanguageModule(tiny_values(causal=False), {}, VOCAB_SIZE, 0.3)
    assert dict(module.hparams)["mask_rate"] == 0.3
    assert (module.mask_token, module.vocab_size) == (VOCAB_SIZE, VOCAB_SIZE + 1)
