"""The shared statistics against loops over single numbers in float64, of a real run that accumulates and clips."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from callbacks.statistics import GradientStatistics, Group, gradient_statistics, watch_update
from lightning_modules.language_module import LanguageModule
from tests.support.fitting import fit
from tests.support.models import make_module, tokens
from tests.support.norms import in_float64, kind_of, norm_by_group

ACCUMULATE = 2
MIXTURE = {"num_shared_experts": 1, "load_balancing_weight": 0.0, "z_loss_weight": 0.0}


class Observer(L.Callback):
    """Asks for the statistics, and keeps a copy of the parameters before each step and of each batch."""

    def __init__(self) -> None:
        self.seen: list[GradientStatistics] = []
        self.models: list[Any] = []
        self.batches: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.batches.append(batch["tokens"])

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(gradient_statistics(trainer, pl_module))
        watch_update(trainer, pl_module)
        self.models.append(in_float64(pl_module.model))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if len(self.batches) % trainer.accumulate_grad_batches == 0:
            assert gradient_statistics(trainer, pl_module) is self.seen[-1], "clipped since, but computed once"


@pytest.fixture(scope="module", params=["dense", "moe"])
def observed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Observer:
    torch.manual_seed(0)
    module = make_module(ffn=request.param, moe=MIXTURE, optim={"lr": 1e-2})
    observer = Observer()
    batches = [tokens(2, 9) for _ in range(3 * ACCUMULATE)]
    options = {"max_steps": 3, "accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": 1e-3}
    fit(tmp_path_factory.mktemp("run"), module, *batches, callbacks=[observer], logger=False, **options)
    return observer


def reference_gradients(model: Any, batches: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    for batch in batches:
        log_probabilities = model(batch[:, :-1])[0].log_softmax(-1)
        (-log_probabilities.gather(-1, batch[:, 1:, None]).mean() / len(batches)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def by_group(statistics: GradientStatistics, values: list[float]) -> dict[Group, float]:
    return dict(zip(statistics.groups, values, strict=True))


def test_gradient_norms_are_accumulated_and_not_clipped(observed: Observer) -> None:
    assert [statistics.step for statistics in observed.seen] == [1, 2, 3]
    for n, (statistics, model) in enumerate(zip(observed.seen, observed.models, strict=True)):
        expected = norm_by_group(reference_gradients(model, observed.batches[ACCUMULATE * n : ACCUMULATE * (n + 1)]))
        assert by_group(statistics, statistics.norms) == pytest.approx(expected, rel=1e-4)
        total = math.sqrt(sum(norm**2 for norm in expected.values()))
        assert statistics.total_norm == pytest.approx(total, rel=1e-4)
        assert total > 0.1, "the run clips at 0.001"
        assert set(statistics.nonfinite) == {0.0}


def test_parameter_and_update_norms(observed: Observer) -> None:
    for n, (statistics, model) in enumerate(zip(observed.seen, observed.models, strict=True)):
        now = dict(model.named_parameters())
        assert by_group(statistics, statistics.parameter_norms) == pytest.approx(norm_by_group(now), rel=1e-5)
        if n == 0:
            assert statistics.update_norms == []
            continue
        before = dict(observed.models[n - 1].named_parameters())
        changes = {name: parameter - before[name] for name, parameter in now.items()}
        assert by_group(statistics, statistics.update_norms) == pytest.approx(norm_by_group(changes), rel=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_one_group(tied: bool) -> None:
    module = make_module(ffn="moe", moe=MIXTURE, tie_embeddings=tied, placement="subln")
    assert module.model is not None
    names = {parameter: name for name, parameter in module.model.named_parameters()}
    groups = [(names[parameter], Group(block, kind)) for block, kind, parameter in module.model.parameter_groups()]
    assert sorted(groups) == sorted((name, kind_of(name)) for name in names.values())


class Poison(L.Callback):
    """In step 2, one gradient entry in 32 of a norm is no number, and one of an embedding infinite."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 1:
            pl_module.model.blocks[1].placement.norm_attn.weight.grad[3] = math.nan
            pl_module.model.embedding.weight.grad[0, 0] = math.inf


def test_the_share_of_nonfinite_entries(tmp_path: Path) -> None:
    module, observer = make_module(), Observer()
    fit(tmp_path, module, tokens(2, 9), tokens(2, 9), callbacks=[Poison(), observer], logger=False, max_steps=2)
    healthy, poisoned = observer.seen
    assert set(healthy.nonfinite) == {0.0}
    shares = by_group(poisoned, poisoned.nonfinite)
    assert shares.pop(Group(2, "norm")) == pytest.approx(1 / 64), "two norms of width 32"
    assert shares.pop(Group(0, "embedding")) == pytest.approx(1 / (50 * 32))
    assert set(shares.values()) == {0.0}
    assert not math.isfinite(poisoned.total_norm)


class Counter(L.Callback):
    """Asks three times a step, and counts what reaches the host meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch, self.transfers = monkeypatch, 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        with self.patch.context() as patch:
            for name in ("tolist", "item", "__float__", "__int__", "__bool__", "cpu", "numpy"):
                patch.setattr(Tensor, name, self._counting(getattr(Tensor, name)))
            for _ in range(3):
                gradient_statistics(trainer, pl_module)

    def _counting(self, method: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            self.transfers += 1
            return method(*arguments)

        return counted


def test_however_many_ask_it_is_one_transfer_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, module = Counter(monkeypatch), make_module()
    fit(tmp_path, module, *[tokens(2, 9)] * 4, callbacks=[counter], logger=False, max_steps=4)
    assert counter.transfers == 4


def test_steps_that_nobody_logs_have_gradients_only(tmp_path: Path) -> None:
    module: LanguageModule = make_module()
    observer = Observer()
    fit(tmp_path, module, *[tokens(2, 9)] * 4, callbacks=[observer], logger=False, max_steps=4, log_every_n_steps=2)
    assert [bool(statistics.parameter_norms) for statistics in observer.seen] == [False, True, False, True]
    assert [bool(statistics.update_norms) for statistics in observer.seen] == [False, True, False, True]
