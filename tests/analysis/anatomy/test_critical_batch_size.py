"""Branches of training against a run that was never interrupted, and against a loop of torch's own optimizer."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from analysis.anatomy.critical_batch_size import Branching, CriticalBatchSize, critical
from analysis.anatomy.held_out import HeldOut
from core.checkpoint import load
from core.errors import ConfigError
from lightning_modules.language_module import LanguageModule
from tests.support.anatomy import inputs_of, make_text
from tests.support.fitting import fit
from tests.support.models import make_module

SEQUENCES, STEPS = 2, 4
BY_VALUE = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}


def text(fitting: int = 16) -> HeldOut:
    """Two sequences in each batch; so many batches for fitting."""
    batches = make_text(batches=fitting, sequences=SEQUENCES, seq=12).batches
    return replace(make_text(batches=2, sequences=SEQUENCES, seq=12), fitting=batches)


def rows_of(made: HeldOut) -> Tensor:
    return torch.cat([batch.rows["tokens"] for batch in made.fitting])


def trained(root: Path, *more: Tensor, **fields: Any) -> LanguageModule:
    """A model after four batches, clipped, and after those that are given; its checkpoint is root/last.ckpt."""
    torch.manual_seed(0)
    clip = {"gradient_clip_val": 1.0, **fields.pop("clip", {})}
    optim = {"schedule": "constant", "lr": 0.02, **fields.pop("optim", {})}
    module = make_module(optim, placement="prenorm", **fields)
    batches = [*torch.randint(50, (STEPS, SEQUENCES, 13)), *more]
    trainer = fit(root, module, *batches, logger=False, max_steps=len(batches), **clip)
    trainer.save_checkpoint(root / "last.ckpt")
    return module


def branching(root: Path, module: LanguageModule) -> Branching:
    path = root / "last.ckpt"
    return Branching(module, load(path)["optimizer_states"][0], STEPS, path, SEQUENCES, 1.0)


def run_of(root: Path, module: LanguageModule, **trainer: Any) -> Any:
    """The run as tools.anatomy opens it, of batches of eight."""
    config = OmegaConf.create({"data": {"batch_size": 8}, "trainer": trainer})
    return SimpleNamespace(module=module, config=config, checkpoint=root / "last.ckpt", step=STEPS)


def mean_loss(model: Any, made: HeldOut) -> float:
    with torch.no_grad():
        logits = torch.cat([model(inputs_of(batch))[0] for batch in made])
    return F.cross_entropy(logits.flatten(0, 1), torch.cat([batch.targets for batch in made]).flatten()).item()


@pytest.mark.parametrize(
    "fields",
    [{}, {"optim": {"optimizer": "muon"}}, {"ffn": "moe", "moe": {"balancing": "bias"}}, {"clip": BY_VALUE}],
    ids=str,
)
def test_the_runs_own_batch_goes_on_as_the_run_does(fields: dict[str, Any], tmp_path: Path) -> None:
    """Against the same run without a branch: optimizer, clipping, auxiliary losses and the routers' biases."""
    made, model = text(), None
    data = rows_of(made)
    longer = trained(tmp_path, *data.split(SEQUENCES), **copy.deepcopy(fields)).model
    module = trained(tmp_path, **copy.deepcopy(fields))
    model = module.model
    assert model is not None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = run_of(tmp_path, module, **{"gradient_clip_val": 1.0, **fields.get("clip", {})})
    made_of = CriticalBatchSize().of_run(run).branching
    assert made_of is not None
    branch = made_of.train(model, {"tokens": data}, SEQUENCES, factor=1.0, at_once=SEQUENCES)
    assert longer is not None
    for name, value in branch.state_dict().items():
        torch.testing.assert_close(value, longer.state_dict()[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)
        assert torch.equal(model.state_dict()[name], before[name])
    assert abs(mean_loss(branch, made) - mean_loss(model, made)) > 0.01


def by_a_loop(root: Path, model: Any, data: Tensor, size: int, lr: float) -> Any:
    """Torch's AdamW in one group, each batch at once."""
    branch = copy.deepcopy(model)
    state = load(root / "last.ckpt")["optimizer_states"][0]["state"]
    optimizer = torch.optim.AdamW(branch.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for number, parameter in enumerate(branch.parameters()):
        optimizer.state[parameter] = {name: value.clone() for name, value in state[number].items()}
    for batch in data.split(size):
        logits, _ = branch(batch[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(branch.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return branch


def test_losses_of_branches_against_a_loop(tmp_path: Path) -> None:
    """Batches of half, once, twice and four times the run's, at rates that go by the root; added up from pairs."""
    module, made = trained(tmp_path, optim={"lr": 0.01, "weight_decay": 0.0}), text(fitting=33)
    assert module.model is not None
    measure = CriticalBatchSize(branching=branching(tmp_path, module), most=7, tolerance=0.0)
    steps: list[None] = []
    state = torch.get_rng_state()
    found = measure(module.model, made.watched(lambda: steps.append(None)))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(steps) == 64 + 32 + 16 + 8 + 4 * len(made.batches), "what a bar shows"
    data = rows_of(made)[:64]
    expected = [
        mean_loss(by_a_loop(tmp_path, module.model, data, size, 0.01 * math.sqrt(size / 2)), made)
        for size in (1, 2, 4, 8)
    ]
    curve = found.curves["branch_loss_by_doubling"]
    assert curve.values == pytest.approx(expected, abs=4e-3)  # 64 steps in fp32
    assert curve.places == [-1, 0, 1, 2], "a batch of 16 would have four steps"
    assert min(abs(a - b) for a, b in itertools.pairwise(expected)) > 0.02
    assert found.scalars["critical_batch_size"] == (1, 2, 4, 8)[critical(expected, 0.0)]
    assert found.notes[0].startswith("Each branch went through 768 tokens, in batches of 1, 2, 4, 8 sequences; ")
    sums = found.by_document["branch_loss_by_doubling"].sum(1) / made.num_targets
    assert sums.tolist() == pytest.approx(curve.values)


@pytest.mark.parametrize(
    ("losses", "place"),
    [
        ([2.0, 2.0, 2.005, 2.02, 1.0], 2),  # what comes after a size that is too large does not count
        ([2.0, 1.9, 1.905, 1.92], 2),  # the best so far is what is held against
        ([2.0, 1.9, 1.8], 2),
        ([2.0, math.nan, 1.9], 0),
        ([2.0], 0),
    ],
)
def test_which_size_is_critical(losses: list[float], place: int) -> None:
    assert critical(losses, 0.01) == place


def test_where_none_is_too_large_it_says_so(tmp_path: Path) -> None:
    module = trained(tmp_path)
    assert module.model is not None
    measure = CriticalBatchSize(branching=branching(tmp_path, module), least=0, most=1, tolerance=100.0)
    found = measure(module.model, text())
    assert found.scalars["critical_batch_size"] == 4
    assert found.notes[1] == "None of the batches was too large: the critical one is larger still."


def test_what_it_takes_of_a_run(tmp_path: Path) -> None:
    module = trained(tmp_path)
    found = CriticalBatchSize(most=1).of_run(run_of(tmp_path, module, accumulate_grad_batches=3, gradient_clip_val=0.5))
    assert found.branching is not None
    assert (found.branching.samples, found.branching.clip, found.branching.lr) == (24, 0.5, 0.02)
    assert found.most == 1
    model: Any = module.model
    assert found.lacks(model) is None
    assert CriticalBatchSize().lacks(model) == "its checkpoint is not one file with the state of an optimizer"
    state = copy.deepcopy(found.branching.state)
    state["param_groups"][0]["lr"] = 0.0
    still = replace(found, branching=replace(found.branching, state=state))
    assert still.lacks(model) == "its learning rate has come to 0"


ODD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "shape": (  # torch's fused AdamW would write beyond its end
        lambda state: state["state"][0].update(exp_avg_sq=torch.zeros(3)),
        r"a checkpoint whose optimizer has the shape \[50, 32\] in exp_avg_sq, where this one has the shape \[3\]",
    ),
    "no tensor": (lambda state: state["state"][1].update(exp_avg=[0.0]), "in exp_avg, where this one has a list"),
    "no step": (lambda state: state["state"][0].pop("step"), "its optimizer cannot be restored"),
    "text": (lambda state: state["state"][0].update(step="x"), r"its optimizer cannot be restored \(ValueError: "),
    "many steps": (lambda state: state["state"][0]["step"].fill_(5), "has stepped 0 to 4 times; it says 5"),
    "no groups": (lambda state: state["param_groups"].clear(), r"its optimizer cannot be restored \(ValueError: "),
    "fewer": (lambda state: state["param_groups"][0]["params"].pop(), "cannot be restored"),
    "no betas": (lambda state: state["param_groups"][0].pop("betas"), r"whose betas is \(0\.9, 0\.95\), .* says None"),
    "maximize": (lambda state: state["param_groups"][0].update(maximize=True), "whose maximize is False, .* says True"),
    "no rate": (lambda state: state["param_groups"][0].pop("lr"), "whose lr is a finite number >= 0; it says None"),
    "no number": (lambda state: state["param_groups"][0].update(lr=math.nan), "a finite number >= 0; it says nan"),
    "downwards": (lambda state: state["param_groups"][1].update(lr=-0.02), "a finite number >= 0; it says -0.02"),
    "another peak": (lambda state: state["param_groups"][1].update(initial_lr=1.0), "whose initial_lr is 0.02, as in"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_optimizer_that_this_run_would_not_have_kept_is_refused(name: str, tmp_path: Path) -> None:
    """Before anything is measured, and in a line; checkpoints come from anywhere."""
    edit, message = ODD[name]
    module, path = trained(tmp_path), tmp_path / "last.ckpt"
    CriticalBatchSize().of_run(run_of(tmp_path, module))
    content = torch.load(path, weights_only=True)
    edit(content["optimizer_states"][0])
    torch.save(content, path)
    with pytest.raises(ConfigError, match=rf"checkpoint='.*last\.ckpt' is not valid: .*{message}"):
        CriticalBatchSize().of_run(run_of(tmp_path, module))


@pytest.mark.parametrize(
    ("name", "value"),
    [("accumulate_grad_batches", 0), ("accumulate_grad_batches", "x"), ("gradient_clip_val", -1.0)],
)
def test_a_configuration_that_no_run_can_have_had_is_refused(name: str, value: object, tmp_path: Path) -> None:
    module = trained(tmp_path)
    with pytest.raises(ConfigError, match=rf"trainer\.{name}={value!r} is not valid: expected an? "):
        CriticalBatchSize().of_run(run_of(tmp_path, module, **{name: value}))


def test_too_little_to_train_on_is_refused(tmp_path: Path) -> None:
    module = trained(tmp_path)
    assert module.model is not None
    for fitting in (7, 0):
        with pytest.raises(ConfigError, match=rf"needs 16 samples for fitting, and there are {2 * fitting}$"):
            CriticalBatchSize(branching=branching(tmp_path, module))(module.model, text(fitting))


@pytest.mark.parametrize(("field", "value"), [("least", 1), ("most", -1), ("tolerance", -0.1), ("tolerance", math.inf)])
def test_options_that_leave_nothing_to_compare_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{field}={value} is not valid"):
        CriticalBatchSize(**{field: value})  # type: ignore[arg-type]
