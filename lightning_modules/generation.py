"""Sampling from a language model."""

import torch
from torch import Tensor

from lightning_modules.transformer import Transformer


@torch.inference_mode()
def generate(model: Transformer, prompt: Tensor, num_tokens: int, temperature: float, seed: int, window: int) -> Tensor:
    """Continue a prompt, token by token.

    Args:
        model: left in the mode (train or eval) it came in.
        prompt: token ids [seq], seq >= 1.
        num_tokens: how many to add.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        seed: of this call's own generator; torch's global one is not touched.
        window: at most so many tokens are looked back at.

    Returns:
        Token ids [seq + num_tokens].

    Raises:
        ValueError: the logits are not finite, as after a run that diverged; there is nothing to draw from.
    """
    generator = torch.Generator(prompt.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    tokens = prompt
    try:
        for _ in range(num_tokens):
            logits = model(tokens[None, -window:])[0][0, -1].float()
            if not logits.isfinite().all():
                raise ValueError("the model's output is not finite")
            if temperature == 0:
                following = logits.argmax(keepdim=True)
            else:
                following = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, following))
    finally:
        model.train(was_training)
    return tokens
