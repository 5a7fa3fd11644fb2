"""Through Lightning and the whole module: no tensor ever holds the logits of all tokens of a large vocabulary."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_modules.cross_entropy import CHUNK, LARGE_VOCABULARY
from lightning_modules.generation import generate
from lightning_modules.language_module import LanguageModule
from tests.support.models import tiny_values
from tools.evaluation.corpora import token_losses

NUM_TOKENS = 2 * 640  # of a batch; not a multiple of a chunk


class Largest(TorchDispatchMode):
    """Sees what every operator returns, those of the backward pass too.

    Attributes:
        numel: elements of the largest tensor so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), 0)
        return out


def module_of(vocab_size: int, **model: Any) -> LanguageModule:
    return LanguageModule(tiny_values(**model), {"warmup_steps": 0}, vocab_size)


def batches(vocab_size: int, num_batches: int) -> Any:
    """Whose items are batches."""
    rows: Any = [{"tokens": torch.randint(vocab_size, (2, NUM_TOKENS // 2 + 1))} for _ in range(num_batches)]
    return DataLoader(rows, batch_size=None)


def largest(module: LanguageModule, precision: Any) -> int:
    """In a fit of one optimizer step of two batches, and a validation."""
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        num_sanity_val_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with Largest() as seen:
        trainer.fit(module, batches(module.vocab_size, 2), batches(module.vocab_size, 1))
    assert trainer.global_step == 1
    return seen.numel


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("model", [{}, {"tie_embeddings": True}, {"ffn": "moe", "activation_checkpointing": True}])
def test_training_and_validation(model: dict[str, Any], precision: str) -> None:
    assert largest(module_of(LARGE_VOCABULARY, **model), precision) == CHUNK["cpu"] * LARGE_VOCABULARY


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_those_of_a_small_vocabulary_are_seen() -> None:
    assert largest(module_of(LARGE_VOCABULARY - 1), "32-true") == NUM_TOKENS * (LARGE_VOCABULARY - 1)


def test_evaluation() -> None:
    module = module_of(LARGE_VOCABULARY)
    module.configure_model()
    (batch,) = batches(LARGE_VOCABULARY, 1)
    logits, _ = module(batch["tokens"][:, :-1])
    expected = -logits.log_softmax(-1).gather(-1, batch["tokens"][:, 1:, None]).squeeze(-1)
    with Largest() as seen, torch.inference_mode():
        losses = token_losses(module, batch)
    torch.testing.assert_close(losses, expected.detach())
    assert seen.numel == CHUNK["cpu"] * LARGE_VOCABULARY


def test_generation_of_a_long_prompt() -> None:
    module = module_of(LARGE_VOCABULARY)
    module.configure_model()
    model: Any = module.model
    prompt = torch.randint(LARGE_VOCABULARY, (NUM_TOKENS // 2,))
    with Largest() as seen:
        new = generate(model, prompt, 1, temperature=0.0, seed=0, window=NUM_TOKENS)
    with torch.inference_mode():
        assert int(new[-1]) == int(model(prompt[None])[0][0, -1].argmax())
    assert seen.numel < len(prompt) * LARGE_VOCABULARY
