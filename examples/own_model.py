"""A language model with attention and feed-forward layers of one's own, SpanNorm around them, and ScaleInit.

pip install .                     # the library alone; torch is all that it needs
python examples/own_model.py      # learns to count in some seconds
"""

import torch
import torch.nn.functional as F
from torch import nn

from spannorm import Depth, NormFactory, SpanNorm, initialize, scale_init


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 16)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, vocab_size, dim, layers):
        super().__init__()
        norm = NormFactory("rmsnorm", dim)
        self.embed, self.head = nn.Embedding(vocab_size, dim), nn.Linear(dim, vocab_size)
        self.blocks = nn.ModuleList(SpanNorm(Depth(i, layers), norm) for i in range(1, layers + 1))
        self.attns = nn.ModuleList(Attention(dim) for _ in self.blocks)
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)) for _ in self.blocks
        )
        roles = {"embed.*": "embedding", "head.*": "head", "*.qkv.*": "query", "*.out.*": "attn_out"}
        initialize(self, scale_init(layers), {**roles, "ffns.*.0.*": "ffn_up", "ffns.*.2.*": "ffn_down"})

    def forward(self, tokens):
        x = self.blocks[0].enter(self.embed(tokens))
        for block, attn, ffn in zip(self.blocks, self.attns, self.ffns, strict=True):
            x = block(x, attn, ffn)
        return self.head(self.blocks[-1].leave(x))


def train(steps=60):
    """Return the losses on sequences that count from a random number, so that all but the first can be known."""
    torch.manual_seed(0)
    model = Model(vocab_size=32, dim=64, layers=4)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        tokens = (torch.randint(32, (8, 1)) + torch.arange(33)) % 32
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = train()
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
