"""Sharpness against whole Hessians of tiny models, and Adam's preconditioner against a step of torch's AdamW."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.anatomy.adam_state import AdamState
from analysis.anatomy.held_out import HeldOut
from analysis.anatomy.sharpness import Sharpness
from core.checkpoint import load
from core.errors import ConfigError
from lightning_modules.language_module import LanguageModule
from lightning_modules.optimizers import make_optimizer
from tests.support.anatomy import make_text
from tests.support.curvature import hessian
from tests.support.fitting import fit
from tests.support.models import tiny_values

VOCAB_SIZE = 5
ITERATIONS = 60


def make(optim: dict[str, Any] | None = None, **fields: Any) -> LanguageModule:
    torch.manual_seed(0)
    values = tiny_values(dim=4, num_heads=1, num_layers=1, ffn_dim=4, moe={"expert_dim": 4, "num_experts": 2}, **fields)
    values |= {"placement": "prenorm"}
    optim = {"warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0, "lr": 0.01, **(optim or {})}
    module = LanguageModule(values, optim, VOCAB_SIZE)
    module.configure_model()
    return module


def text() -> HeldOut:
    return make_text(batches=1, sequences=2, seq=6, vocab_size=VOCAB_SIZE)


def whole(rows: HeldOut) -> Tensor:
    """What the text was made of, [batch, seq + 1]."""
    batch = rows.batches[0]
    return batch.rows["tokens"]


def trained(root: Path, module: LanguageModule) -> dict[str, Any]:
    """The checkpoint after three steps."""
    batches = [torch.randint(VOCAB_SIZE, (2, 7)) for _ in range(3)]
    trainer = fit(root, module, *batches, logger=False, max_steps=3)
    trainer.save_checkpoint(root / "last.ckpt")
    return load(root / "last.ckpt")


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_the_ends_of_the_hessian(ffn: str) -> None:
    model, rows = make(ffn=ffn).model, text()
    assert model is not None
    spectrum = torch.linalg.eigvalsh(hessian(model, whole(rows)))
    found = Sharpness(iterations=ITERATIONS)(model.train(), rows)
    assert found.scalars["hessian_top"] == pytest.approx(spectrum[-1].item(), rel=1e-3)
    assert found.scalars["hessian_bottom"] == pytest.approx(spectrum[0].item(), rel=1e-3)
    assert set(found.scalars) == {"hessian_top", "hessian_bottom"}
    assert model.training


def test_as_many_sequences_as_asked_for() -> None:
    model, rows = make().model, text()
    assert model is not None
    spectrum = torch.linalg.eigvalsh(hessian(model, whole(rows)[:1]))
    found = Sharpness(sequences=1, iterations=ITERATIONS)(model, rows)
    assert found.scalars["hessian_top"] == pytest.approx(spectrum[-1].item(), rel=1e-3)


def test_sequences_are_the_text_s_in_whatever_batches() -> None:
    """Three, of one batch or of three; and it says how many there were."""
    model, whole_text = make().model, make_text(batches=1, sequences=3, seq=6, vocab_size=VOCAB_SIZE)
    assert model is not None
    (batch,) = whole_text.batches
    apart = [batch.part(n, n + 1) for n in range(3)]
    for sequences, note in ((2, "Of the first 2 held-out sequences."), (5, "Of the first 3 held-out sequences.")):
        measure = Sharpness(sequences=sequences, iterations=5)
        found = [measure(model, text) for text in (whole_text, replace(whole_text, batches=tuple(apart)))]
        assert found[0].scalars == pytest.approx(found[1].scalars, rel=1e-6)
        assert found[0].notes[0] == found[1].notes[0] == note
    with_positions = [
        replace(part, rows={**part.rows, "positions": torch.tensor([[n, 0, 1]])}) for n, part in enumerate(apart)
    ]
    beginning = replace(whole_text, batches=tuple(with_positions)).beginning(2)
    assert beginning.rows["positions"].tolist() == [[0, 0, 1], [1, 0, 1]]


def preconditioner_by_a_step(module: LanguageModule, content: dict[str, Any], rows: Tensor) -> Tensor:
    """What torch's AdamW divides the average of gradients by, entry by entry, seen from a step of it."""
    model = module.model
    assert model is not None
    optimizer = make_optimizer(model, module.optim_config)
    numbered = {id(p): n for n, p in enumerate(model.parameters())}
    saved = content["optimizer_states"][0]
    for group, kept in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        assert [numbered[id(p)] for p in group["params"]] == kept["params"]
        for parameter in group["params"]:
            kept = saved["state"][numbered[id(parameter)]]
            optimizer.state[parameter] = {name: value.clone() for name, value in kept.items()}
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.zero_grad()
    logits, _ = model(rows[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
    optimizer.step()
    parts = []
    for parameter, old in zip(model.parameters(), before, strict=True):
        step = parameter.detach() - old
        parts.append((-module.optim_config.lr * optimizer.state[parameter]["exp_avg"] / step).flatten())
        parameter.data.copy_(old)
    return torch.cat(parts)


@pytest.mark.parametrize(
    "optim", [{"eps": 1e-3}, {"eps": 1e-3, "groups": {"head": {"lr_factor": 3.0}, "ffn_up": {"lr_factor": 2.0}}}]
)
def test_preconditioned_by_what_adamw_divides_by(optim: dict[str, Any], tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        module, rows = make(optim).double(), text()
        model, content = module.model, trained(tmp_path, module)
        assert model is not None
        matrix = hessian(model, whole(rows)).numpy()
        divisor = preconditioner_by_a_step(module, content, whole(rows)).numpy()
        state = AdamState.of(content, model)
        assert state is not None
        found = Sharpness(iterations=ITERATIONS, adam=state)(model, rows)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (divisor > 0).all()
    expected = np.linalg.eigvals(matrix / divisor[:, None]).real.max()
    assert found.scalars["preconditioned_sharpness"] == pytest.approx(expected, rel=1e-3)
    assert found.scalars["stability_threshold"] == pytest.approx(38 / 0.01)
    assert found.scalars["peak_stability_threshold"] == pytest.approx(38 / 0.01)


def distance_after(curvature: float, lr: float, beta1: float) -> float:
    """How far from the bottom of a parabola an average of gradients ends after 2000 steps from 1."""
    x, average = 1.0, 0.0
    for _ in range(2000):
        average = beta1 * average + (1 - beta1) * curvature * x
        x -= lr * average
    return abs(x)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_steps_diverge_beyond_the_threshold(beta1: float, tmp_path: Path) -> None:
    module = make({"betas": (beta1, 0.95)})
    state = AdamState.of(trained(tmp_path, module), module.model)  # type: ignore[arg-type]
    assert state is not None
    assert state.beta1 == beta1
    threshold = state.threshold(0.02)
    assert distance_after(0.99 * threshold, 0.02, beta1) < 0.1
    assert distance_after(1.01 * threshold, 0.02, beta1) > 10


def test_a_checkpoint_in_pieces_says_the_same(tmp_path: Path) -> None:
    module = make({"groups": {"ffn_up": {"lr_factor": 3.0}}})
    content, model = trained(tmp_path, module), module.model
    assert model is not None
    names = [f"model.{name}" for name, _ in model.named_parameters()]
    (state,) = content["optimizer_states"]
    by_name = {
        "state": {names[number]: kept for number, kept in state["state"].items()},
        "param_groups": [{**g, "params": [names[number] for number in g["params"]]} for g in state["param_groups"]],
    }
    one, other = AdamState.of(content, model), AdamState.of({"optimizer_0": by_name}, model)
    assert one is not None
    assert other is not None
    assert one.moments.keys() == other.moments.keys() == dict(model.named_parameters()).keys()
    for name, moment in one.moments.items():
        assert torch.equal(moment.square, other.moments[name].square)
        assert moment[1:] == other.moments[name][1:]
        assert moment.rate == (3.0 if name.endswith(("gate_proj.weight", "up_proj.weight")) else 1.0)
    run: Any = SimpleNamespace(module=module, checkpoint=tmp_path / "last.ckpt")
    taken = Sharpness(iterations=3).of_run(run)
    assert taken.iterations == 3
    assert taken.adam is not None
    assert taken.adam.moments.keys() == one.moments.keys()
    assert (one.lr, one.peak_lr) == (other.lr, other.peak_lr) == (0.01, 0.01)


def test_a_rate_of_nothing_has_no_threshold(tmp_path: Path) -> None:
    """As at the end of a schedule that goes down to 0."""
    module = make({"schedule": "wsd", "decay_fraction": 1.0, "min_lr_ratio": 0.0})
    model, content = module.model, trained(tmp_path, module)
    assert model is not None
    state = AdamState.of(content, model)
    assert state is not None
    assert (state.lr, state.peak_lr) == (0.0, 0.01)
    found = Sharpness(iterations=3, adam=state)(model, text())
    assert "stability_threshold" not in found.scalars
    assert found.scalars["peak_stability_threshold"] == pytest.approx(3800)


def test_without_second_moments_nothing_is_preconditioned(tmp_path: Path) -> None:
    module = make({"optimizer": "muon"})
    model, content = module.model, trained(tmp_path, module)
    assert model is not None
    assert AdamState.of(content, model) is None
    assert AdamState.of({}, model) is None
    _, note = Sharpness(iterations=3)(model, text()).notes
    assert note == "Without the second moments of Adam nothing is preconditioned."


ODD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "shape": lambda state: state["state"][0].update(exp_avg_sq=torch.zeros(3)),
    "integers": lambda state: state["state"][0].update(exp_avg_sq=state["state"][0]["exp_avg_sq"].int()),
    "no tensor": lambda state: state["state"][0].update(exp_avg_sq=[0.0]),
    "step": lambda state: state["state"][0].update(step="x"),
    "digits": lambda state: state["state"][0].update(step="3"),
    "steps": lambda state: state["state"][0].update(step=torch.ones(2)),
    "endless step": lambda state: state["state"][0].update(step=float("inf")),
    "long step": lambda state: state["state"][0].update(step=10**400),
    "no moments": lambda state: state["state"][0].clear(),
    "kept": lambda state: state["state"].update({0: [1, 2]}),
    "state": lambda state: state.update(state=None),
    "no betas": lambda state: [group.pop("betas") for group in state["param_groups"]],
    "one beta": lambda state: [group.update(betas=(0.9,)) for group in state["param_groups"]],
    "beta of 1": lambda state: [group.update(betas=(1.0, 0.9)) for group in state["param_groups"]],
    "eps": lambda state: [group.update(eps=None) for group in state["param_groups"]],
    "no rate": lambda state: [group.pop("lr") for group in state["param_groups"]],
    "rate": lambda state: [group.update(lr=float("nan")) for group in state["param_groups"]],
    "no parameters": lambda state: [group.pop("params") for group in state["param_groups"]],
    "parameters": lambda state: [group.update(params=[[0]]) for group in state["param_groups"]],
    "no groups": lambda state: state["param_groups"].clear(),
    "groups": lambda state: state.update(param_groups=7),
}


def test_a_state_that_adam_has_not_kept_preconditions_nothing(tmp_path: Path) -> None:
    module = make()
    content, model = trained(tmp_path, module), module.model
    assert model is not None
    assert AdamState.of(content, model) is not None
    for name, change in ODD.items():
        odd = copy.deepcopy(content)
        change(odd["optimizer_states"][0])
        assert AdamState.of(odd, model) is None, name
    for states in ("x", 3, [], [None], [[]], {"a": 1}):
        assert AdamState.of({"optimizer_states": states}, model) is None, states
    assert AdamState.of({"optimizer_0": "x"}, model) is None


def test_what_cannot_be_differentiated_twice_is_said() -> None:
    model = make(activation_checkpointing=True).model
    assert model is not None
    assert Sharpness().lacks(model) == "it cannot see through model.activation_checkpointing=true"
    assert Sharpness().lacks(make().model) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["sequences", "iterations"])
def test_nothing_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field}=0 is not valid: expected an integer >= 1"):
        Sharpness(**{field: 0})
