"""No pair of the model's options turns a part of it into a constant, whose parameters the loss then never moves.

For each pair the loss has a gradient in every parameter, at the start or (ReZero's gates are closed) after a few steps.
Else the pair is refused, or `frozen` names the part, with the reason that the documentation gives.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from core.errors import ConfigError
from lightning_modules.config import OptimConfig
from lightning_modules.initialization import initialize
from lightning_modules.optim import SCHEDULES, make_schedule
from lightning_modules.transformer import Transformer
from spannorm import INITS, NORMS, PLACEMENTS
from spannorm.initialization import TARGETS
from tests.support.models import VOCAB_SIZE, tiny_config, tokens

Choice = dict[str, Any]
TINY = {"dim": 12, "num_heads": 2, "ffn_dim": 8}
OF_PLACEMENTS: dict[str, list[Choice]] = {
    "spannorm": [{"first_norm": False}],
    "b2t": [{"last_skip": True}],
    **{name: [{"gpas": True}] for name in ("prenorm", "deepnorm")},
    "mixln": [{"gpas": True}, *({"post_fraction": fraction} for fraction in (0.0, 0.5, 1.0))],
    "keel": [{"alpha": "sqrt"}, {"alpha": 1.0}, {"ease_in": True}],
    "siamesenorm": [{"count_sublayers": True}, {"normed_sum": True}, {"head_norms": True}],
    "hc": [{"static": True}, {"streams": 2}],
    "mhc": [{"start": "uniform"}, {"iterations": 1}],
    "gr": [{"rank": 1}],
}
OF_INITS: dict[str, list[Choice]] = {
    "plain": [{"std": 0.0}, {"embedding_std": 0.0}, {"embedding_std": 0.632}],
    "megatron": [{"std": None}, {"std": 0.0}, {"head": "fan_in"}],
    "scale_init": [{"factor": "sublayers"}, {"targets": []}, {"targets": list(TARGETS)}],
    "b2t": [{"base": "fairseq"}],
    "deepscalelm": [{"correlation": 0.01}, {"correlation": 0.0}],
}
OF_NORMS: dict[str, list[Choice]] = {
    "dyt": [
        {"alpha": 0.0},
        {"alpha": 5.0},
        {"alpha_attention": 0.0},
        {"embedding_scale": None},
        {"embedding_scale": 0},
    ],
    "derf": [{"alpha": 0.0}, {"shift": 0.5}],
    "gatednorm": [{"up_std": 0.1}, {"kind": "dyt"}, {"kind": "none", "rank": 1}],
}


def with_options(axis: str, names: Any, options: dict[str, list[Choice]]) -> list[Choice]:
    """Every name by itself, and with each of its options."""
    plain = [{axis: name} for name in names]
    return plain + [{axis: name, f"{axis}_options": one} for name, several in options.items() for one in several]


def of_moe(**values: Any) -> Choice:
    return {"ffn": "moe", **{f"moe.{name}": value for name, value in values.items()}}


STRUCTURES = [
    {"tie_embeddings": True},
    {"num_layers": 1},
    {"num_kv_heads": 1},
    {"activation_checkpointing": True},
    {"ffn_dim": 1},
    {"dim": 4},
    {"dim": 2, "num_heads": 1},
    {"init_truncation": 0.5},
    {"norm_eps": 10.0},
    *({"placement_options": {"final_norm": value}} for value in (True, False)),
]
MIXTURES = [
    *(of_moe(top_k=k) for k in (1, 2, 4)),
    of_moe(num_experts=1, top_k=1),
    of_moe(score="sigmoid"),
    of_moe(expert_dim=1),
    of_moe(jitter=0.5),
    *(of_moe(normalize_weights=value) for value in (True, False)),
    *(of_moe(balancing=kind) for kind in ("loss", "bias", "none")),
    of_moe(num_shared_experts=1),
    of_moe(num_shared_experts=1, shared_expert_weighted_sum=True),
    of_moe(first_dense_layers=1),
    of_moe(layer_interval=2),
]
CHOICES: dict[str, list[Choice]] = {
    "placement": with_options("placement", PLACEMENTS, OF_PLACEMENTS),
    "norm": with_options("norm", NORMS, OF_NORMS),
    "init": with_options("init", INITS, OF_INITS),
    "structure": STRUCTURES,
    "mixture": MIXTURES,
}

REFUSED = {
    "model.init_options",
    "model.init_options.correlation",
    "model.moe.layer_interval",
    *(f"model.norm_options.{name}" for name in ("alpha", "alpha_attention", "embedding_scale")),
}
"""The fields that are refused for some value or pair, most of them as they would leave a constant."""


def merged(*choices: Choice) -> Choice | None:
    """All of them at once; None: one takes back what the other says."""
    both: Choice = {}
    for choice in choices:
        for name, value in choice.items():
            if isinstance(value, dict) and name in both:
                both[name] = {**both[name], **value}
            elif both.setdefault(name, value) != value:
                return None
    moe = {name.removeprefix("moe."): both.pop(name) for name in list(both) if name.startswith("moe.")}
    return {**TINY, **both, "moe": {"expert_dim": 8, **moe}}


def pairs(one: str, other: str | None = None) -> Iterator[tuple[str, Choice]]:
    """Each choice of one kind with each of another, or with those of its own kind."""
    both = itertools.product(CHOICES[one], CHOICES[other]) if other else itertools.combinations(CHOICES[one], 2)
    for left, right in both:
        choice = merged(left, right)
        if choice is not None:
            yield f"{left} with {right}", choice


def frozen(choice: Choice) -> str | None:
    """The parameter that the loss cannot move under a choice, by documentation."""
    moe = choice["moe"]
    if choice.get("ffn") != "moe" or moe.get("top_k", 2) > 1:
        return None
    # With one expert there is nothing to choose. And what older versions began goes on as it was; no new run may.
    lone = moe.get("num_experts") == 1 and moe.get("score", "softmax") == "softmax"
    return "router" if lone or moe.get("normalize_weights") is True else None


def without_gradient(choice: Choice) -> set[str]:
    """The parameters that the loss does not move, in double precision: a constant's gradient is then 1e-17, not 0."""
    model = Transformer(tiny_config(**choice), VOCAB_SIZE).double()
    initialize(model)
    sequence = tokens(12, 17)
    still = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(6):  # what is closed at the start, or begins tiny, needs some steps
        optimizer.zero_grad()
        logits = model(sequence[:, :-1])[0]
        F.cross_entropy(logits.flatten(0, 1), sequence[:, 1:].flatten()).backward()
        largest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
        assert largest > 1e-6, "nothing learns"
        still = {n: p for n, p in still.items() if p.grad is None or p.grad.abs().max() < 1e-11 * largest}
        if not still:
            break
        optimizer.step()
    return set(still)


def check(several: Iterable[tuple[str, Choice]]) -> tuple[int, Counter[str]]:
    """(how many learn, how many are refused by field)."""
    learn, refused = 0, Counter[str]()
    for name, choice in several:
        try:
            found = without_gradient(choice)
        except ConfigError as error:
            refused[error.field] += 1
            continue
        part, learn = frozen(choice), learn + 1
        expected = {n for n in found if part is not None and part in n}
        assert found == expected, f"{name}: no gradient in {sorted(found)}"
        assert (part is None) == (not found), f"{name}: {part} learns, and is said not to"
    return learn, refused


def test_the_loss_moves_every_parameter_under_every_option_and_pair_of_a_mixtures() -> None:
    alone = [(str(choice), both) for choices in CHOICES.values() for choice in choices if (both := merged(choice))]
    learn, refused = check([*alone, *pairs("mixture")])
    assert learn > 180
    assert set(refused) == REFUSED


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(CHOICES, 2)))
def test_the_loss_moves_every_parameter_under_every_pair(one: str, other: str) -> None:
    learn, refused = check(pairs(one, other))
    assert learn > 20
    assert set(refused) <= {*REFUSED, "model.norm"}


@pytest.mark.slow
def test_the_loss_moves_every_parameter_under_pairs_of_structures() -> None:
    assert check(pairs("structure"))[0] > 40


@pytest.mark.parametrize("choice", MIXTURES, ids=str)
def test_each_kind_of_balancing_moves_the_router_where_there_is_a_choice(choice: Choice) -> None:
    """By the gradient of its loss or by its bias; `none` by neither. Where every expert gets every token, nothing."""
    values = merged(choice)
    assert values is not None
    model = Transformer(tiny_config(**values), VOCAB_SIZE).double()
    initialize(model)
    moe, statistics = model.config.moe, model(tokens(4, 9))[1]
    loss = moe.balance_weight * torch.stack([layer.load_balancing_loss for layer in statistics]).sum()
    loss.backward() if loss.requires_grad else None
    chooses = moe.top_k < moe.num_experts
    for layer, mixture in zip(statistics, model.mixtures().values(), strict=True):
        gradient = mixture.router.layer.weight.grad
        moved = gradient is not None and bool(gradient.abs().max() > 1e-9)
        assert moved == (chooses and moe.balancing == "loss")
        mixture.router.update_bias(layer.tokens_per_expert)
        bias = mixture.router.expert_bias
        assert (bias is not None) == (moe.balancing == "bias")
        assert bias is None or bool(bias.abs().max() > 0) == chooses


def test_one_token_has_nothing_to_compare_itself_with() -> None:
    """In sequences of one token attention is a constant, as docs/placements.md says."""
    model = Transformer(tiny_config(**TINY), VOCAB_SIZE)
    F.cross_entropy(model(tokens(9, 1))[0].flatten(0, 1), tokens(9)).backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9}
    assert still == {f"blocks.{block}.attn.{name}_proj.weight" for block in (0, 1) for name in "qk"}


@pytest.mark.parametrize("warmup_steps", [0, 1, 5, 50])
@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    "schedule",
    [
        *({"schedule": kind} for kind in SCHEDULES),
        *({"schedule": "wsd", "decay_fraction": fraction} for fraction in (0.0, 0.5, 1.0)),
        *({"schedule": "wsd", "decay_shape": "exponential", "decay_fraction": fraction} for fraction in (0.0, 1.0)),
    ],
    ids=str,
)
def test_no_schedule_takes_the_rate_away_before_the_last_step(
    schedule: Choice, min_lr_ratio: float, warmup_steps: int
) -> None:
    options = {**schedule, "min_lr_ratio": min_lr_ratio, "warmup_steps": warmup_steps}
    if "decay_shape" in schedule and min_lr_ratio == 0:
        with pytest.raises(ConfigError, match=r"optim\.min_lr_ratio=0\.0"):
            OptimConfig(**options)
        return
    config = OptimConfig(**options)
    factor = make_schedule(config, num_steps=20)
    assert all(factor(step) > 0 for step in range(20))
