"""docs/own_script.md, piece after piece as a reader would run them, in a working folder of their own."""

import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import optuna
import pytest
import torch
import torch.nn.functional as F
from optuna.trial import TrialState

from datamodules.synthetic import Synthetic
from lightning_modules.language_module import LanguageModule
from lightning_modules.optim import make_schedule
from lightning_modules.optimizers import make_optimizer
from tests.support.fitting import loader
from tests.support.own_pieces import page

PIECES = re.findall(r"^```python\n(.*?)^```", page("own_script"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the pieces have defined, run one after the other."""
    names: dict[str, Any] = {"folder": tmp_path_factory.mktemp("script")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(names["folder"])
        torch.manual_seed(0)
        for number, piece in enumerate(PIECES):
            exec(compile(piece, f"docs/own_script.md, piece {number}", "exec"), names)
    return names


def test_each_is_short() -> None:
    assert len(PIECES) == 8
    assert all(len(piece.splitlines()) <= 19 for piece in PIECES)


def test_the_trainer_has_trained_and_saved(script: dict[str, Any]) -> None:
    assert script["trainer"].global_step == 20
    assert (script["folder"] / "mine/checkpoints/last.ckpt").is_file()


def test_a_trial_is_given_up_by_what_a_monitor_logs(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate of 1 the first block's gradients vanish; at 0.001 the trial goes to its end."""
    assert all(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in script["study"].trials)
    monkeypatch.chdir(script["folder"])
    study = optuna.create_study(pruner=script["study"].pruner)
    for rate in (1e-3, 1.0):
        study.enqueue_trial({"lr": rate})
    study.optimize(script["objective"], n_trials=2)
    good, bad = study.trials
    assert (good.state, bad.state) == (TrialState.COMPLETE, TrialState.PRUNED)
    assert sorted(good.intermediate_values) == [5, 10, 15, 20]
    assert all(0.5 < value < 2 for value in good.intermediate_values.values())
    assert 0 < max(bad.intermediate_values) < 20


def test_test_and_predict_agree_with_the_logits(script: dict[str, Any]) -> None:
    module, data = script["module"].eval(), script["data"]
    batches = [batch["tokens"] for batch in data.val_dataloader()]
    with torch.no_grad():
        expected = [
            torch.log_softmax(module(tokens[:, :-1])[0].double(), -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
            for tokens in batches
        ]
    assert [part.shape for part in script["log_probs"]] == [(8, 32)] * 4
    for found, part in zip(script["log_probs"], expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), part, atol=1e-5, rtol=1e-5)
    (metrics,) = script["metrics"]
    loss = -float(torch.cat(expected).mean())
    assert metrics["test/loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["test/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert set(metrics) == {"test/loss", "test/perplexity"}


def test_it_has_generated(script: dict[str, Any]) -> None:
    assert script["tokens"][:3] == [1, 2, 3]
    assert len(script["tokens"]) == 8


def test_loaded_is_what_was_trained(script: dict[str, Any]) -> None:
    batch = torch.randint(16, (2, 9))
    expected = script["module"].eval()(batch)[0]
    for name in ("loaded", "slower"):
        assert torch.equal(script[name].eval()(batch)[0], expected)
    assert script["slower"].optim_config.lr == 1e-4
    assert script["loaded"].optim_config.lr == 3e-3


def test_what_the_own_loop_saves_is_loaded(script: dict[str, Any]) -> None:
    assert script["schedule"].last_epoch == 20
    loaded = LanguageModule.load_from_checkpoint(script["folder"] / "mine.ckpt")
    batch = torch.randint(16, (2, 9))
    assert torch.equal(loaded(batch)[0], script["mine"](batch)[0])


OWN_LOOP = {
    "dense": {},
    "balanced by a loss": {"ffn": "moe", "moe": {"num_experts": 4, "expert_dim": 24}},
    "balanced by a bias": {"ffn": "moe", "moe": {"num_experts": 4, "expert_dim": 24, "balancing": "bias"}},
}


@pytest.mark.parametrize("name", OWN_LOOP)
def test_an_own_loop_takes_the_trainers_steps(name: str, tmp_path: Path) -> None:
    model = {"dim": 32, "num_layers": 2, "num_heads": 2, **OWN_LOOP[name]}
    data = Synthetic("copy", vocab_size=16, seq_len=32, batch_size=8, val_batches=1)
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        modules.append(LanguageModule(model=model, optim={"warmup_steps": 2}, vocab_size=16))
        modules[-1].configure_model()
    theirs, mine = modules
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "logger": False, "limit_val_batches": 0, "default_root_dir": tmp_path, **quiet}
    torch.manual_seed(1)
    L.Trainer(max_steps=6, **options).fit(theirs, datamodule=data)
    torch.manual_seed(1)
    own_data = Synthetic("copy", vocab_size=16, seq_len=32, batch_size=8, val_batches=1)
    optimizer = make_optimizer(mine.model, mine.optim_config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, make_schedule(mine.optim_config, num_steps=6))
    for step, batch in zip(range(6), own_data.train_dataloader(), strict=False):
        mine.training_step(batch, step).backward()
        mine.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    found, expected = mine.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    biases = [value for key, value in found.items() if key.endswith("router.expert_bias")]
    assert bool(biases) == (name == "balanced by a bias")
    assert all(bias.any() for bias in biases)


def test_another_set_is_tested_on_by_a_loader(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(script["folder"])
    tokens = torch.randint(16, (3, 11))
    module = script["module"]
    (metrics,) = script["trainer"].test(module, dataloaders=loader(tokens), verbose=False)
    with torch.no_grad():
        expected = F.cross_entropy(module(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
    assert metrics["test/loss"] == pytest.approx(float(expected), rel=1e-5)
