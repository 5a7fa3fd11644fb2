"""Lion beside a written-out one, rates and decay by role, optimizers by import path, and what is refused of them."""

import copy
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.divergence.step_override import StepOverride
from core.checkpoint import load
from core.errors import ConfigError
from lightning_modules.config import ModelConfig, OptimConfig, parse
from lightning_modules.language_module import LanguageModule
from lightning_modules.lion import Lion
from lightning_modules.optim import check_settings, check_state, group_settings
from lightning_modules.optimizers import make_optimizer, state_sizes
from lightning_modules.transformer import Transformer
from lightning_modules.unused_options import describe_unused
from tests.support.comparing import assert_equal
from tests.support.fitting import loader, make_trainer
from tests.support.models import VOCAB_SIZE, make_module, tiny_config, tiny_values, tokens

HIDDEN = ("_proj.weight", "w1", "v1", "w2")


def rates(ffn: str = "dense", **optim: Any) -> dict[str, tuple[float, float]]:
    """By a parameter's name: its rate and decay."""
    model = Transformer(tiny_config(ffn=ffn), VOCAB_SIZE)
    groups = make_optimizer(model, parse(OptimConfig, "optim", optim)).param_groups
    of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) == len(of)
    return {name: of[id(p)] for name, p in model.named_parameters()}


def test_three_steps_of_lion() -> None:
    lr, beta1, beta2, decay = 0.1, 0.8, 0.6, 0.5
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 3))
    optimizer = Lion([weight], lr=lr, betas=(beta1, beta2), weight_decay=decay)
    w, m = weight.detach().tolist(), [[0.0] * 3 for _ in range(5)]
    for _ in range(3):
        gradient = torch.randn(5, 3)
        weight.grad = gradient
        optimizer.step()
        for i in range(5):
            for j in range(3):
                g = float(gradient[i, j])
                c = beta1 * m[i][j] + (1 - beta1) * g
                w[i][j] = w[i][j] - lr * ((c > 0) - (c < 0) + decay * w[i][j])
                m[i][j] = beta2 * m[i][j] + (1 - beta2) * g
    torch.testing.assert_close(weight.detach(), torch.tensor(w))


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "torch.optim.SGD"])
def test_groups_give_rate_and_decay_by_role(optimizer: str) -> None:
    groups = {"embedding": {"lr_factor": 0.5, "weight_decay": 0.3}, "router": {"lr_factor": 0.1}, "norm": {}}
    groups["ffn_down"] = {"weight_decay": 0.0}
    found = rates("moe", optimizer=optimizer, lr=0.01, weight_decay=0.2, groups=groups)
    for name, (lr, decay) in found.items():
        if name == "embedding.weight":
            assert (lr, decay) == (0.005, 0.3)
        elif "router" in name:
            assert (lr, decay) == (0.001, 0.2)
        elif name.endswith("w2"):
            assert (lr, decay) == (0.01, 0.0)
        else:
            assert (lr, decay) == (0.01, 0.2 if name.endswith((*HIDDEN, "head.weight")) else 0.0), name


def test_the_first_group_has_the_rate_itself() -> None:
    """It is the one that is logged, and that the line about a resumed schedule speaks of."""
    model = Transformer(tiny_config(), VOCAB_SIZE)
    groups = {role: {"lr_factor": 0.1} for role in ("embedding", "norm", "head")}
    assert make_optimizer(model, OptimConfig(lr=0.01, groups=groups)).param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"tail": {}}, r"optim\.groups\.tail=\{\} .* one of .*embedding.*norm"),
        ({"router": {}}, r"optim\.groups\.router=\{\} .* a role that this model's parameters have"),
        ({"head": 3}, r"optim\.groups\.head=3 .* lr_factor, weight_decay"),
        ({"head": {"lr": 0.1}}, r"optim\.groups\.head\.lr=0\.1 .* one of lr_factor, weight_decay"),
        ({"head": {"lr_factor": -1}}, r"optim\.groups\.head\.lr_factor=-1 .* a number >= 0"),
        ({"head": {"weight_decay": True}}, r"optim\.groups\.head\.weight_decay=True .* a number >= 0"),
    ],
)
def test_groups_that_cannot_be(groups: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LanguageModule(tiny_values(), {"groups": groups}, VOCAB_SIZE)


def test_any_class_gets_the_groups_and_its_options() -> None:
    model = Transformer(tiny_config(), VOCAB_SIZE)
    optim = OptimConfig(optimizer="torch.optim.SGD", optimizer_options={"momentum": 0.7}, lr=0.3, weight_decay=0.2)
    optimizer = make_optimizer(model, optim)
    assert type(optimizer) is torch.optim.SGD
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.3, 0.7, 0),
        (0.3, 0.7, 0.2),
    ]


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"optimizer": "muno"}, r"optim\.optimizer='muno' .* one of adamw, lion, muon \(did you mean muon\?\)"),
        ({"optimizer": "torch.optim.No"}, r"optim\.optimizer='torch\.optim\.No' .* can be imported"),
        ({"optimizer": "no_such.Thing"}, r"optim\.optimizer='no_such\.Thing' .* can be imported"),
        ({"optimizer": "torch.optim.LBFGS", "weight_decay": 0}, r"optim\.optimizer='torch\.optim\.LBFGS' .* groups"),
        ({"optimizer": "torch.optim.Muon"}, r"optim\.optimizer='torch\.optim\.Muon' .* only supports 2D"),
        ({"optimizer": "torch.optim.Rprop"}, r"optim\.weight_decay=0\.1 .* 0 with optim\.optimizer=.*Rprop"),
        ({"optimizer": "torch.nn.Linear"}, r"optim\.optimizer='torch\.nn\.Linear' .* parameters and lr"),
        ({"optimizer": "torch.optim.SGD", "optimizer_options": {"mometum": 1}}, r"optimizer_options\.mometum=1 .* no"),
        ({"optimizer": "torch.optim.SGD", "optimizer_options": {"lr": 1}}, r"optimizer_options\.lr=1 .* no such field"),
        ({"optimizer": "torch.optim.SGD", "optimizer_options": {"momentum": -1}}, r"optimizer=.*Invalid momentum"),
        ({"optimizer_options": {"momentum": 1}}, r"optim\.optimizer_options\.momentum=1 .* no such field"),
        ({"optimizer": "muon", "optimizer_options": {"scale": "big"}}, r"optimizer_options\.scale='big' .* original"),
        ({"optimizer": "muon", "optimizer_options": {"ns_steps": 0}}, r"optimizer_options\.ns_steps=0 .* 1 to 100"),
        ({"optimizer": "muon", "optimizer_options": {"ns_dtype": "fp8"}}, r"optimizer_options\.ns_dtype='fp8' .* one"),
        ({"optimizer": "muon", "optimizer_options": {"momentum": 1}}, r"optimizer_options\.momentum=1 .* \[0, 1\)"),
        ({"optimizer": "muon", "optimizer_options": {"ns_coefficients": [1]}}, r"coefficients=\[1\] .* three numbers"),
        (
            {"optimizer": "torch.optim.SGD", "width_scaling": "mup"},
            r"optim\.width_scaling='mup' .* none with optim\.optimizer=torch\.optim\.SGD: .*adamw, lion, muon",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_before_there_are_weights(optim: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        LanguageModule(tiny_values(), optim, VOCAB_SIZE)
    assert "\n" not in str(caught.value)


def test_one_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_optimizers.py").write_text(
        "import torch\n\n"
        "class Mine(torch.optim.SGD):\n"
        "    def __init__(self, params, lr, weight_decay=0.0, boost=1.0):\n"
        "        super().__init__(params, lr=lr, weight_decay=weight_decay)\n"
        "        self.boost = boost\n\n"
        "def none(params, lr, **rest):\n    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    model = Transformer(tiny_config(), VOCAB_SIZE)
    made: Any = make_optimizer(model, OptimConfig(optimizer="my_optimizers.Mine", optimizer_options={"boost": 2.0}))
    assert made.boost == 2.0
    with pytest.raises(ConfigError, match=re.escape("not one that makes a NoneType")):
        make_optimizer(model, OptimConfig(optimizer="my_optimizers.none"))


def test_options_without_effect_are_named() -> None:
    def lines(**optim: Any) -> list[str]:
        return describe_unused(ModelConfig(), OptimConfig(**optim))

    assert lines(optimizer="lion", eps=1e-6) == [
        "optim.eps=1e-06 has no effect: optim.optimizer=lion divides by nothing"
    ]
    (line,) = lines(optimizer="torch.optim.SGD", betas=(0.5, 0.5))
    assert "optim.betas" in line
    assert "optim.optimizer_options" in line
    assert lines(optimizer="muon", eps=1e-6, betas=(0.5, 0.5)) == []


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_what_they_keep_of_each_parameter(ffn: str) -> None:
    """As steps on real weights leave it, and by the numbers of moments that are known."""
    with torch.device("meta"):
        weightless = Transformer(tiny_config(ffn=ffn), VOCAB_SIZE)
    real = Transformer(tiny_config(ffn=ffn), VOCAB_SIZE)
    names = {id(p): name for name, p in weightless.named_parameters()}
    for optimizer, of_hidden, of_rest in (("adamw", 2, 2), ("muon", 1, 2), ("lion", 1, 1), ("torch.optim.SGD", 0, 0)):
        config = OptimConfig(optimizer=optimizer)
        sizes = {names[id(p)]: size for p, size in state_sizes(weightless, config).items()}
        made = make_optimizer(real, config)
        for parameter in real.parameters():
            parameter.grad = torch.ones_like(parameter)
        made.step()
        for name, parameter in real.named_parameters():
            kept = [x for key, x in made.state[parameter].items() if isinstance(x, torch.Tensor) and key != "step"]
            moments = of_hidden if name.endswith(HIDDEN) else of_rest
            assert sizes.get(name, 0) == sum(x.numel() for x in kept) == moments * parameter.numel(), name
        assert all(parameter.grad is None for parameter in weightless.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "torch.optim.SGD"])
def test_a_moment_of_another_shape_is_refused(optimizer: str) -> None:
    model = Transformer(tiny_config(), VOCAB_SIZE)
    options = {"momentum": 0.5} if optimizer == "torch.optim.SGD" else {}
    made = make_optimizer(model, OptimConfig(optimizer=optimizer, optimizer_options=options))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    check_state(made, 1, "x.ckpt")
    state = made.state[model.blocks[0].attn.q_proj.weight]  # type: ignore[union-attr]
    name = next(name for name in state if name != "step")
    state[name] = state[name][:3].clone()
    with pytest.raises(ConfigError, match=rf"x\.ckpt.*\[32, 32\] in {name}, where this one has the shape \[3, 32\]"):
        check_state(made, 1, "x.ckpt")


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
def test_a_scaled_loss_gives_the_same_step_and_none_where_it_overflows(optimizer: str) -> None:
    """As trainer.precision=16-mixed scales it."""
    torch.manual_seed(0)
    scaled, plain = (Transformer(tiny_config(), VOCAB_SIZE) for _ in range(2))
    plain.load_state_dict(scaled.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ours, theirs = (make_optimizer(model, OptimConfig(optimizer=optimizer)) for model in (scaled, plain))
    x = torch.randint(VOCAB_SIZE, (2, 8))
    for factor in (1.0, float("inf")):
        before = {name: p.detach().clone() for name, p in scaled.named_parameters()}
        scaler.scale(scaled(x)[0].square().mean() * factor).backward()
        scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        ours.zero_grad()
        plain(x)[0].square().mean().backward()
        theirs.step()
        for name, parameter in scaled.named_parameters():
            expected = plain.get_parameter(name) if factor == 1.0 else before[name]
            torch.testing.assert_close(parameter, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("matrix_rows", 8),
        ("matrix_rows", None),
        ("update_factor", -1.0),
        ("ns_dtype", "float64"),
        ("ns_steps", 99),
        ("ns_coefficients", [1.0, 2.0, 3.0]),
        ("momentum", 0.0),
        ("nesterov", False),
        ("maximize", True),
    ],
)
def test_settings_of_muon_from_elsewhere_are_refused(name: str, value: Any) -> None:
    """torch takes a checkpoint's settings for its own."""
    config = OptimConfig(optimizer="muon")
    optimizer = make_optimizer(Transformer(tiny_config(), VOCAB_SIZE), config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    expected = group_settings(optimizer, config)
    optimizer.load_state_dict(optimizer.state_dict())
    check_settings(scheduler, expected, 0, "x.ckpt")
    optimizer.param_groups[1][name] = value
    with pytest.raises(ConfigError, match=rf"x\.ckpt.* a checkpoint whose {name} is "):
        check_settings(scheduler, expected, 0, "x.ckpt")


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "torch.optim.SGD"])
def test_a_step_can_be_skipped_or_made_smaller(optimizer: str) -> None:
    """As the policies against divergence do: neither weights nor moments know of the skipped one."""
    model = make_module(ffn="moe").model
    assert model is not None
    made = make_optimizer(model, OptimConfig(optimizer=optimizer, weight_decay=0.0))
    override = StepOverride(made)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    made.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = copy.deepcopy(made.state_dict())
    override.skip()
    made.step()
    assert_equal({name: p.detach() for name, p in model.named_parameters()}, before, "weights")
    assert_equal(made.state_dict(), state, "state")
    twin = copy.deepcopy(model)
    again = make_optimizer(twin, OptimConfig(optimizer=optimizer, weight_decay=0.0))
    again.load_state_dict(state)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert own.grad is not None
        other.grad = own.grad.clone()
    override.scale_lr(0.25)
    made.step()
    again.step()
    for name, parameter in model.named_parameters():
        moved, whole = parameter - before[name], twin.get_parameter(name) - before[name]
        torch.testing.assert_close(
            moved, 0.25 * whole, atol=1e-6, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert made.param_groups[0]["lr"] == again.param_groups[0]["lr"]


KEEPS = """
import torch


class Coded(torch.Tensor):
    pass


class Keeps(torch.optim.SGD):
    def __init__(self, params, lr, weight_decay=0.0, what="number", gpu=False):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.what, self.gpu = what, gpu

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if self.gpu and p.device.type == "meta":
                    raise RuntimeError("no such kernel")
                self.state[p].update(made=[{"n": 3, "t": torch.zeros(2)}], kept=self.kept())
        return loss

    def kept(self):
        kinds = {"number": lambda: 0.5, "tensor": lambda: torch.ones(1), "object": object}
        return kinds[self.what]() if self.what in kinds else torch.ones(3).as_subclass(Coded)
"""


@pytest.mark.parametrize(("what", "named"), [("number", ""), ("tensor", ""), ("object", "object"), ("code", "Coded")])
def test_one_whose_checkpoints_could_not_be_read_is_refused_before_the_run(
    what: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_keeping.py").write_text(KEEPS)
    monkeypatch.syspath_prepend(tmp_path)
    optim = {"optimizer": "my_keeping.Keeps", "optimizer_options": {"what": what}, "weight_decay": 0.0}
    module, trainer = LanguageModule(tiny_values(), optim, VOCAB_SIZE), make_trainer(tmp_path, max_steps=2)
    if not named:
        module.check_run(trainer, resumed=False)
        trainer.fit(module, loader(tokens(2, 9), tokens(2, 9)), loader(tokens(2, 9)))
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        load(tmp_path / "a.ckpt")
        return
    valid = f"expected one that keeps plain tensors and numbers, as checkpoints hold, and no {named}"
    with pytest.raises(ConfigError, match=rf"^optim\.optimizer='my_keeping\.Keeps' is not valid: {valid}$"):
        module.check_run(trainer, resumed=False)
    unknown = {**optim, "optimizer_options": {"what": what, "gpu": True}}
    LanguageModule(tiny_values(), unknown, VOCAB_SIZE).check_run(trainer, resumed=False)
