"""The LightningModule: what it builds, what its loss is made of, what it logs, and that a checkpoint gives it back."""

import math
from functools import partialmethod
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from core.errors import ConfigError
from lightning_modules.composing import register_schemas
from lightning_modules.language_module import LanguageModule
from lightning_modules.optimizers import make_optimizer
from tests.support.fitting import Recorder, fit, loader, make_trainer
from tests.support.models import VOCAB_SIZE, make_module, tiny_values, tokens

ROOT = Path(__file__).parents[2]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -logits.log_softmax(dim=-1).gather(-1, targets[..., None]).mean()


def test_the_constructor_allocates_nothing_and_configure_model_builds_once() -> None:
    before = torch.random.get_rng_state()
    module = LanguageModule(tiny_values(), {}, VOCAB_SIZE)
    assert module.model is None
    assert not list(module.parameters())
    assert torch.equal(before, torch.random.get_rng_state())

    module.configure_model()
    model = module.model
    weights = {name: weight.clone() for name, weight in module.state_dict().items()}
    module.configure_model()
    assert module.model is model
    torch.testing.assert_close(module.state_dict(), weights, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("model", "optim", "field", "valid"),
    [
        ({"placement": "spanorm"}, {}, "model.placement", "did you mean spannorm?"),
        ({"placement_options": {"frist_norm": True}}, {}, "model.placement_options.frist_norm", "first_norm"),
        ({"placement_options": {"depth": 3}}, {}, "model.placement_options.depth", "no such field"),
        ({"norm": "rms"}, {}, "model.norm", "rmsnorm"),
        ({"ffn": "sparse"}, {}, "model.ffn", "one of dense, mlp, moe"),
        ({"ffn": "moe", "moe": {"backend": "cuda"}}, {}, "model.moe.backend", "auto, grouped, loop"),
        ({"init": "xavier"}, {}, "model.init", "scale_init"),
        ({"init": "plain", "init_options": {"std": -1.0}}, {}, "model.init_options", "standard deviation > 0"),
        ({}, {"schedule": "linear"}, "optim.schedule", "one of constant, cosine, wsd"),
        ({"num_heads": 3}, {}, "model.dim", "a multiple of 2 x model.num_heads=3"),
    ],
    ids=str,
)
def test_the_constructor_refuses_what_cannot_be_built(
    model: dict[str, Any], optim: dict[str, Any], field: str, valid: str
) -> None:
    with pytest.raises(ConfigError) as error:
        LanguageModule(tiny_values(**model), optim, VOCAB_SIZE)
    assert error.value.field == field
    assert valid in error.value.valid


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_loss_and_metrics_of_a_step_of_two_batches(ffn: str, tmp_path: Path) -> None:
    moe = {"load_balancing_weight": 0.3, "z_loss_weight": 0.7}
    module = make_module({"lr": 0.0}, ffn=ffn, moe=moe)  # the weights stay, so that all can be computed here
    batches, recorder, losses = [tokens(2, 9) for _ in range(4)], Recorder(), []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
            losses.append(2 * outputs["loss"].item())  # Lightning has divided it by the number of accumulated batches

    fit(tmp_path, module, *batches, max_steps=2, accumulate_grad_batches=2, logger=recorder, callbacks=[Losses()])

    entropies, totals, statistics = [], [], []
    for batch in batches:
        logits, stats = module.model(batch[:, :-1])
        entropies.append(cross_entropy(logits, batch[:, 1:]))
        balance, z_loss = (sum(getattr(s, name) for s in stats) / 2 for name in ("load_balancing_loss", "z_loss"))
        totals.append(entropies[-1] + 0.3 * balance + 0.7 * z_loss)
        statistics.append((balance, z_loss, [s.tokens_per_expert for s in stats]))
    assert losses == pytest.approx([total.item() for total in totals], rel=1e-5)

    of_steps = [(entropies[0] + entropies[1]) / 2, (entropies[2] + entropies[3]) / 2]
    assert recorder.series("train/loss") == pytest.approx([loss.item() for loss in of_steps], rel=1e-5)
    gradients = torch.autograd.grad((totals[2] + totals[3]) / 2, list(module.parameters()))
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    assert recorder.series("optim/grad_norm")[1] == pytest.approx(norm, rel=1e-4)
    if ffn == "moe":  # 2 batches of 16 tokens x 2 over 4 experts: 16 is the mean load
        (balance, z_loss, loads), (balance_2, z_loss_2, loads_2) = statistics[2:]
        max_load = max((a + b).max() / 16 for a, b in zip(loads, loads_2, strict=True))
        expected = {"load_balancing_loss": (balance + balance_2) / 2, "z_loss": (z_loss + z_loss_2) / 2}
        for key, value in {**expected, "max_load": max_load}.items():
            assert recorder.series(f"moe/{key}")[-1] == pytest.approx(value.item(), rel=1e-5), key
    else:
        assert not recorder.series("moe/z_loss")


def test_the_learning_rate_follows_the_schedule_step_by_step(tmp_path: Path) -> None:
    recorder = Recorder()
    module = make_module({"lr": 0.004, "warmup_steps": 4})
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "log_every_n_steps": 2, "logger": recorder}
    fit(tmp_path, module, *[tokens(2, 9)] * 12, max_steps=6, **options)
    # Warm-up 1/4, 2/4, 3/4, 1, then the cosine of 2 steps from 1 to 0.1; every second step is logged.
    assert recorder.series("optim/lr") == pytest.approx([0.002, 0.004, 0.0022])


def test_validation_weighs_every_token_the_same(tmp_path: Path) -> None:
    module, batches, reference = make_module(ffn="moe"), [tokens(2, 9), tokens(5, 4)], Perplexity()
    (metrics,) = make_trainer(tmp_path, logger=False).validate(module, loader(*batches), verbose=False)
    with torch.no_grad():
        for batch in batches:
            reference.update(module(batch[:, :-1])[0], batch[:, 1:])
    assert metrics["val/perplexity"] == pytest.approx(reference.compute().item(), rel=1e-5)
    assert metrics["val/loss"] == pytest.approx(math.log(metrics["val/perplexity"]), rel=1e-5)


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_a_checkpoint_gives_the_module_back_without_executing_code(ffn: str, tmp_path: Path) -> None:
    module = make_module(ffn=ffn, num_kv_heads=2, placement_options={"first_norm": False})
    trainer = fit(tmp_path, module, tokens(2, 9), tokens(2, 9), max_steps=2, logger=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt")

    loaded = LanguageModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.model_config == module.model_config
    assert loaded.optim_config == module.optim_config
    batch = tokens(2, 9)
    torch.testing.assert_close(loaded(batch)[0], module(batch)[0], atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch looks at it while it traces
@pytest.mark.parametrize(("ffn", "num_layers"), [("dense", 2), ("moe", 1)])
def test_compiled_blocks_compute_the_same(ffn: str, num_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    plain, compiled = (make_module(ffn=ffn, num_layers=num_layers, compile=on) for on in (False, True))
    compiled.load_state_dict(plain.state_dict())  # under the same names
    batch = tokens(2, 9)
    results = []
    for module in (plain, compiled):
        logits, stats = module(batch)
        loss = logits.square().mean() + sum(s.z_loss + s.load_balancing_loss for s in stats)
        results.append((logits, torch.autograd.grad(loss, list(module.parameters()))))
    assert graphs
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)


def test_the_gpu_model_has_a_billion_parameters_and_300_million_active() -> None:
    register_schemas()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides=["experiment=moe_spannorm_gpu"])
    model: Any = OmegaConf.to_container(config.model, resolve=True)
    total, active = LanguageModule(model, {}, vocab_size=257).num_parameters
    assert total == pytest.approx(1e9, rel=0.1)
    assert active == pytest.approx(3e8, rel=0.1)


@pytest.mark.parametrize(("ffn", "tied"), [("dense", False), ("dense", True), ("moe", False)])
def test_num_parameters_counts_the_weights_and_the_experts_at_work(ffn: str, tied: bool) -> None:
    module = make_module(ffn=ffn, tie_embeddings=tied)
    total = sum(parameter.numel() for parameter in module.parameters())
    idle = 2 * 2 * 3 * 24 * 32 if ffn == "moe" else 0  # 2 layers x 2 idle experts x 3 matrices of 24 x 32
    assert module.num_parameters == (total, total - idle)


def test_the_model_may_have_more_rows_than_the_data_has_tokens(tmp_path: Path) -> None:
    module = LanguageModule(tiny_values(vocab_size=VOCAB_SIZE + 14), {}, VOCAB_SIZE)
    module.configure_model()
    assert module.model is not None
    assert module.hparams["vocab_size"] == VOCAB_SIZE
    assert module.model.embedding.num_embeddings == module.model.head.out_features == VOCAB_SIZE + 14
    assert module.num_parameters == module.model.num_parameters()
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size=49 is not valid: expected at least 50, the size of the data"
    ):
        LanguageModule(tiny_values(vocab_size=VOCAB_SIZE - 1), {}, VOCAB_SIZE)


def test_biases_are_stepped_as_norms_are() -> None:
    module = make_module(qkv_bias=True, optim={"weight_decay": 0.5})
    assert module.model is not None
    biases = {p for name, p in module.model.named_parameters() if name.endswith("_proj.bias")}
    assert len(biases) == 6
    for group in make_optimizer(module.model, module.optim_config).param_groups:
        assert group["weight_decay"] == 0.0 or not biases & set(group["params"])
    assert {kind for _, kind, p in module.model.parameter_groups() if p in biases} == {"norm"}


def test_a_model_that_sees_the_tokens_to_come_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.causal=False is not valid: expected true: .*mlm_spannorm"):
        make_module(causal=False)
