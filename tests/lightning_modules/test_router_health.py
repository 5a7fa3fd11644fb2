"""Router health in numbers done by hand, and through the Trainer: one value a step, whatever its number of batches."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules import transformer_module
from lightning_modules.layers.router import RouterStats
from lightning_modules.router_health import router_health, tally
from tests.support.fitting import Recorder, fit, loader, make_trainer
from tests.support.models import make_module, tokens

aten = torch.ops.aten


def stats(load: list[float], *scalars: float) -> RouterStats:
    return RouterStats(torch.tensor(load), *(torch.tensor(scalar) for scalar in scalars))


def test_health_of_two_layers_over_two_batches() -> None:
    first = tally([stats([4, 0, 2, 2], 1.0, 10.0, 0.5, 0.1, 2.0), stats([2, 2, 2, 2], 3.0, 20.0, 0.7, 0.3, 4.0)])
    second = tally([stats([4, 0, 4, 0], 2.0, 12.0, 0.5, 0.1, 2.0), stats([2, 2, 2, 2], 3.0, 20.0, 0.7, 0.3, 4.0)])
    health = {key: value.item() for key, value in router_health(first + second, [2, 5]).items()}

    by_layer = {  # loads [8, 0, 6, 2] and [4, 4, 4, 4]; means 4
        "load_balancing_loss": (1.5, 3.0, 2.25),
        "z_loss": (11.0, 20.0, 15.5),
        "entropy": (0.5, 0.7, 0.6),
        "top1_margin": (0.1, 0.3, 0.2),
        "logits_norm": (2.0, 4.0, 3.0),
        "max_load": (2.0, 1.0, 2.0),
        "load_cv": ((16 + 16 + 4 + 4) ** 0.5 / 2 / 4, 0.0, (16 + 16 + 4 + 4) ** 0.5 / 2 / 4),
        "dead_experts": (1.0, 0.0, 1.0),
    }
    expected = {
        key: value
        for name, values in by_layer.items()
        for key, value in zip((f"moe/layer_2/{name}", f"moe/layer_5/{name}", f"moe/{name}"), values, strict=True)
    }
    assert health == pytest.approx(expected)


def test_no_value_is_looked_at_on_the_way() -> None:
    on_meta = stats([4, 0, 2, 2], 1.0, 10.0, 0.5, 0.1, 2.0)
    layer = RouterStats(*(value.to("meta") for value in on_meta))  # which has no values
    assert all(value.is_meta for value in router_health(tally([layer, layer]), [1, 2]).values())


class Looks(TorchDispatchMode):
    """Counts what would make a GPU's host wait: a value taken out of a tensor, a shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.masked_select)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("balancing", ["loss", "bias"])
def test_a_logged_step_of_a_mixture_looks_at_no_more_values_than_a_dense_one(balancing: str, tmp_path: Path) -> None:
    def looks(ffn: str) -> int:
        module = make_module(ffn=ffn, moe={"backend": "grouped", "balancing": balancing})
        mode, recorder = Looks(), Recorder()

        def watched(hook: Callable[..., Any], *arguments: Any) -> Any:
            with mode:
                return hook(*arguments)

        for name in ("training_step", "on_before_optimizer_step", "on_train_batch_end"):
            setattr(module, name, partial(watched, getattr(module, name)))
        fit(tmp_path, module, *[tokens(2, 9)] * 2, max_steps=2, logger=recorder)
        assert len(recorder.series("moe/max_load")) == (2 if ffn == "moe" else 0)
        return mode.count

    assert looks("moe") == looks("dense")


def test_one_transfer_brings_all_to_the_host_before_loggers_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, recorder, transferred = make_module(ffn="moe"), Recorder(), []

    def to_another_host(tensor: torch.Tensor) -> torch.Tensor:
        transferred.append(tensor.shape)
        return torch.zeros_like(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", to_another_host)
    fit(tmp_path, module, *[tokens(2, 9)] * 2, max_steps=2, logger=recorder)
    assert transferred[:3] == [(2, 1 + 5 + 4), (2, 1 + 5 + 4), ()], "the last is Lightning's, at the end of the run"
    assert recorder.series("moe/dead_experts") == [2 * 4] * 2, "as no token came over"
    assert all(torch.tensor(recorder.series("moe/z_loss")).isnan())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_two_batches_moves_each_bias_once_by_the_load_of_both(checkpointing: bool, tmp_path: Path) -> None:
    moe = {"balancing": "bias", "bias_update_rate": 2**-6, "first_dense_layers": 1}
    options: dict[str, Any] = {"ffn": "moe", "moe": moe, "num_layers": 3, "activation_checkpointing": checkpointing}
    module, recorder, batches = make_module({"lr": 0.0}, **options), Recorder(), [tokens(n, 9) for n in (4, 2, 5, 3)]
    assert module.model is not None
    routers = [mixture.router for mixture in module.model.mixtures().values()]
    for router in routers:
        torch.nn.init.normal_(router.layer.weight, std=0.5)

    expected, loads = torch.zeros(2, 4), []  # of layers 2 and 3
    for pair in (batches[:2], batches[2:]):
        for router, bias in zip(routers, expected, strict=True):
            router.expert_bias = bias.clone()
        by_batch = [[stats.tokens_per_expert for stats in module(batch[:, :-1])[1]] for batch in pair]
        load = torch.stack([torch.stack(by_layer) for by_layer in by_batch]).sum(0)
        expected = expected + 2**-6 * (load.mean(1, keepdim=True) - load).sign()
        loads.append(load)
    assert not torch.equal(*expected)
    for router in routers:
        router.expert_bias = torch.zeros(4)

    fit(tmp_path, module, *batches, max_steps=2, accumulate_grad_batches=2, log_every_n_steps=2, logger=recorder)
    make_trainer(tmp_path, logger=False).validate(module, loader(batches[0]), verbose=False)  # moves nothing
    assert [router.expert_bias.tolist() for router in routers if router.expert_bias is not None] == expected.tolist()
    for layer, load in enumerate(loads[1], start=2):
        (logged,) = recorder.series(f"moe/layer_{layer}/max_load")
        assert logged == pytest.approx((load.max() / load.mean()).item())
    assert not recorder.series("moe/layer_1/max_load")


@pytest.mark.parametrize(("balancing", "tallied"), [("loss", 2), ("bias", 4)])
def test_steps_that_are_not_logged_count_only_what_moves_the_bias(
    balancing: str, tallied: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    for function in (tally, router_health):

        def counted(*arguments: Any, function: Callable[..., Any] = function) -> Any:
            calls[function.__name__] += 1
            return function(*arguments)

        monkeypatch.setattr(transformer_module, function.__name__, counted)
    module = make_module(ffn="moe", moe={"balancing": balancing})
    fit(tmp_path, module, *[tokens(2, 9)] * 4, max_steps=4, log_every_n_steps=2, logger=Recorder())
    assert calls == {"tally": tallied, "router_health": 2}


def test_with_the_bias_no_loss_balances(tmp_path: Path) -> None:
    totals = []
    for balancing in ("bias", "none", "loss"):
        torch.manual_seed(0)
        module = make_module({"lr": 0.0}, ffn="moe", moe={"balancing": balancing, "load_balancing_weight": 10.0})

        class Loss(L.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
                totals.append(outputs["loss"].item())

        fit(tmp_path, module, tokens(2, 9), max_steps=1, logger=False, callbacks=[Loss()])
    assert totals[0] == totals[1]
    assert totals[2] > totals[0] + 5
