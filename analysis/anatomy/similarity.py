"""Measures how like each other the states at all depths are, and how much room there is in them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.anatomy.findings import Curve, Findings, Picture
from analysis.anatomy.held_out import HeldOut
from analysis.anatomy.measure import Comparison, Measure, other_positions
from analysis.anatomy.passage import Passage
from analysis.states import effective_rank, mean_cosine
from core.errors import require
from lightning_modules.trunk import Trunk
from spannorm.precision import without_autocast

AT_ONCE = 1024
"""Tokens whose states are in fp64 at once."""


def hidden_states(passage: Passage) -> list[Tensor]:
    """Return the hidden state at every depth, as the placement gives it, each fp32 [batch, seq, features]."""
    placement = passage.blocks()[0].placement
    return [placement.hidden(state).float() for state in passage.states()]


def cosines(states: list[Tensor]) -> Tensor:
    """Return the cosine of every pair of depths at each token, [depths, depths, tokens] in fp64.

    Args:
        states: of each depth, [batch, seq, dim], in any type; autocast does not round them.
    """
    with without_autocast(states[0]):
        parts = zip(*(state.flatten(0, 1).split(AT_ONCE) for state in states), strict=True)
        return torch.cat([_cosines(torch.stack([_wide(x) for x in part])) for part in parts], dim=-1)


def _cosines(states: Tensor) -> Tensor:
    units = F.normalize(states, dim=-1)
    return torch.einsum("itd,jtd->ijt", units, units).clamp(-1, 1)


def _wide(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()  # mps has no fp64


def angular_distances(states: list[Tensor]) -> Tensor:
    """Return arccos(cosine) / pi of every pair of depths at each token, [depths, depths, tokens]: 2403.17887."""
    return torch.arccos(cosines(states)) / math.pi


def linear_cka(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Return the linear CKA of each pair of representations of the same tokens: 1905.00414.

    With centered features X and Y it is |Y^T X|^2 / (|X^T X| |Y^T Y|) in Frobenius norms; here of the Gram matrices
    X X^T, which say the same and have the size of the number of tokens.

    Args:
        first, second: lists of [tokens, features]; the numbers of features may differ.

    Returns:
        [len(first), len(second)] in fp64, from 0 to 1; nan where all tokens are represented alike.
    """
    with without_autocast(first[0]):
        grams = [torch.stack([_unit_gram(x) for x in states]) for states in (first, second)]
        return grams[0] @ grams[1].mT


def _unit_gram(x: Tensor) -> Tensor:
    centered = _wide(x) - _wide(x).mean(0)
    gram = (centered @ centered.mT).flatten()
    return gram / gram.norm()


def sampled(data: HeldOut, positions: int) -> Iterator[tuple[Any, Tensor]]:
    """Yield each batch with the places of its positions [n], flattened, that are among so many of all data.

    They are evenly spaced; data of fewer give all.
    """
    every = max(1, -(-data.num_positions // positions))
    passed = 0
    for batch in data:
        size = batch.num_positions
        yield batch, torch.arange(-passed % every, size, every)
        passed += size


def gathered(model: Trunk, data: HeldOut, positions: int) -> list[Tensor]:
    """Return the hidden states of evenly spaced tokens at every depth, each [tokens, features]."""
    parts: list[list[Tensor]] = [[] for _ in range(len(model.blocks) + 1)]
    for batch, places in sampled(data, positions):
        for part, state in zip(parts, hidden_states(Passage(model, batch)), strict=True):
            part.append(state.flatten(0, 1)[places.to(state.device)])
    return [torch.cat(part) for part in parts]


@dataclass(frozen=True)
class Similarity(Measure):
    """Measures the similarity of all pairs of depths, and of the tokens at each depth.

    | name | what |
    |---|---|
    | cka | linear CKA of each pair of depths (1905.00414), over `positions` tokens |
    | cosine | mean cosine of a token's states at each pair of depths |
    | angular_distance | arccos of that cosine over pi, mean (2403.17887) |
    | block_influence | 1 - mean cosine of a token's state before and after the block (2403.03853) |
    | effective_rank | exp of the entropy of a sequence's normalized singular values, by depth |
    | token_similarity | mean cosine of two tokens of a sequence, by depth |

    As scalars block_influence is the mean over blocks, the last two are those of the last depth, and late_similarity is
    the mean CKA of all pairs of depths in the later half.

    Attributes:
        positions: tokens that CKA is taken over, evenly spaced; memory grows with the square of them.
    """

    name: ClassVar[str] = "similarity"
    about: ClassVar[str] = "similarity of all pairs of depths (CKA, cosine, angle), effective rank, token similarity"
    outcomes: ClassVar[tuple[str, ...]] = ("block_influence", "effective_rank", "token_similarity", "late_similarity")

    positions: int = 1024

    def __post_init__(self) -> None:
        require(self.positions >= 2, "positions", self.positions, "an integer >= 2")

    @torch.inference_mode()
    def __call__(self, model: Trunk, data: HeldOut) -> Findings:
        depths = len(model.blocks) + 1
        parts: list[list[Tensor]] = [[] for _ in range(depths)]
        cosine, angle = torch.zeros(depths, depths).double(), torch.zeros(depths, depths).double()
        rank, alike = torch.zeros(depths).double(), torch.zeros(depths).double()
        sequences = 0
        for batch, places in sampled(data, self.positions):
            states = hidden_states(Passage(model, batch))
            cosine += cosines(states).sum(-1).cpu()
            angle += angular_distances(states).sum(-1).cpu()
            size = batch.num_samples
            sequences += size
            rank += size * torch.stack([effective_rank(state).cpu() for state in states]).double()
            alike += size * torch.stack([mean_cosine(state).cpu() for state in states]).double()
            for part, state in zip(parts, states, strict=True):
                part.append(state.flatten(0, 1)[places.to(state.device)])
        cosine, angle, rank, alike = (
            cosine / data.num_positions,
            angle / data.num_positions,
            rank / sequences,
            alike / sequences,
        )
        kept = [torch.cat(part) for part in parts]
        cka = linear_cka(kept, kept)
        influence = (1 - cosine.diagonal(1)).tolist()
        late = cka[depths // 2 :, depths // 2 :]
        pairs = late[tuple(torch.triu_indices(len(late), len(late), 1))]
        return Findings(
            scalars={
                "block_influence": sum(influence) / len(influence),
                "effective_rank": float(rank[-1]),
                "token_similarity": float(alike[-1]),
                "late_similarity": float(pairs.mean()),
            },
            curves={
                "block_influence_by_block": Curve(influence),
                "effective_rank_by_depth": Curve(rank.tolist(), "depth", 0),
                "token_similarity_by_depth": Curve(alike.tolist(), "depth", 0),
            },
            matrices={"cka": cka.tolist(), "cosine": cosine.tolist(), "angular_distance": angle.tolist()},
            pictures=(
                Picture("cka", "heat map", ("cka",), "linear CKA of the states at two depths"),
                Picture("cosine", "heat map", ("cosine",), "cosine of a token's states at two depths"),
                Picture("block_influence", "curves", ("block_influence_by_block",), "1 - cosine of before and after"),
                Picture("effective_rank", "curves", ("effective_rank_by_depth",), "effective rank of a sequence"),
                Picture("token_similarity", "curves", ("token_similarity_by_depth",), "cosine of two tokens"),
            ),
        )


@dataclass(frozen=True)
class CrossSimilarity(Comparison):
    """Measures the linear CKA of each depth of one model with each depth of another (1905.00414).

    Attributes:
        positions: tokens that it is taken over, evenly spaced.
    """

    name: ClassVar[str] = "cross_similarity"
    about: ClassVar[str] = "linear CKA of each depth of the first run with each depth of another"

    positions: int = 1024

    def __post_init__(self) -> None:
        require(self.positions >= 2, "positions", self.positions, "an integer >= 2")

    def lacks(self, first: Trunk, second: Trunk) -> str | None:
        """Say that the two take other positions, so that nothing of one stands for something of the other."""
        return other_positions(first, second)

    @torch.inference_mode()
    def __call__(self, first: Trunk, second: Trunk, data: HeldOut) -> Findings:
        cka = linear_cka(*(gathered(model, data, self.positions) for model in (first, second)))
        title = "linear CKA of depths, the first run's down, the other's across"
        return Findings(
            matrices={"cross_cka": cka.tolist()}, pictures=(Picture("cross_cka", "heat map", ("cross_cka",), title),)
        )
