"""CompleteP: factors against the published table, sizes against depth, the placements that it is for, and exports."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import ConfigError
from lightning_modules.config import OptimConfig, parse
from lightning_modules.depth_scaling import depth_scaling
from lightning_modules.initialization import initialize
from lightning_modules.optimizers import make_optimizer
from lightning_modules.transformer import Transformer
from spannorm import PLACEMENTS
from tests.support.models import VOCAB_SIZE, make_module, tiny_config, tokens
from tools.coordinate_check import STEPS, check_depth, spread
from tools.exporting import remote_code
from tools.exporting.modeling_placement import PlacementConfig, PlacementForCausalLM

PLAIN = {"gr", "ihc", "prenorm", "subln"}


def adamw_eps(name: str, width: float, depth: float) -> float:
    """Epsilon over that of the base model, by the name of the parameter: 2505.01618, equation 40, with alpha = 1."""
    outside = not name.startswith("blocks.") or "final_norm" in name
    return 1 / width if outside else 1 / (width * depth)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("width", "scaling"), [(1, "none"), (2, "mup")])
def test_rates_decay_and_epsilon_follow_the_table(optimizer: str, tied: bool, width: int, scaling: str) -> None:
    """Six blocks on a base of two: three times as deep."""
    values: dict[str, Any] = {"placement": "prenorm", "num_layers": 6, "tie_embeddings": tied, "ffn_dim": None}
    wide = {"width_scaling": scaling, "base_width": 32 // width}
    deep = {"depth_scaling": "completep", "base_num_layers": 2}
    model = Transformer(tiny_config(**values), VOCAB_SIZE)
    plain = OptimConfig(optimizer=optimizer, lr=1e-2, eps=1e-6, **wide)
    scaled = OptimConfig(optimizer=optimizer, lr=1e-2, eps=1e-6, **wide, **deep)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def groups(config: OptimConfig) -> dict[str, dict[str, Any]]:
        return {names[id(p)]: g for g in make_optimizer(model, config).param_groups for p in g["params"]}

    before, after = groups(plain), groups(scaled)
    assert before.keys() == after.keys() == set(names.values())
    for name, group in after.items():
        assert group["lr"] == before[name]["lr"], "m_L to the power of alpha - 1"
        assert group["weight_decay"] == before[name]["weight_decay"]
        assert group["eps"] == pytest.approx(1e-6 * adamw_eps(name, width, 3), rel=1e-12), name
        assert before[name]["eps"] == 1e-6
    assert make_optimizer(model, scaled).param_groups[0]["lr"] == 1e-2, "the one that is logged"


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_every_branch_counts_as_much_as_the_base_is_shallower(ffn: str) -> None:
    module = make_module({"depth_scaling": "completep"}, placement="prenorm", num_layers=8, ffn=ffn, init="fan_in")
    assert module.model is not None
    sequence, outputs = tokens(2, 7), list[Tensor]()
    for block in module.model.blocks:
        for part in (block.attn, block.ffn):
            part.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    logits = module.model(sequence)[0]
    stream = module.model.embedding(sequence) + torch.stack(outputs).sum(0) / 4
    final = module.model.blocks[-1].placement.final_norm
    torch.testing.assert_close(logits, module.model.head(final(stream)))  # type: ignore[operator]


@pytest.mark.parametrize("init", ["megatron", "scale_init", "deepnorm", "plain"])
def test_the_init_is_that_of_the_base_depth(init: str) -> None:
    deep = make_module({"depth_scaling": "completep"}, placement="prenorm", num_layers=8, init=init, dim=64)
    base = make_module({}, placement="prenorm", num_layers=2, init=init, dim=64)
    assert deep.model is not None
    assert base.model is not None
    for name in ("attn.o_proj", "ffn.down_proj", "attn.q_proj"):
        stds = [model.blocks[1].get_parameter(f"{name}.weight").std().item() for model in (deep.model, base.model)]
        assert stds[0] == pytest.approx(stds[1], rel=0.1), name


def test_at_the_base_depth_it_changes_nothing_to_the_bit() -> None:
    def trained(**optim: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = make_module({"lr": 1e-2, **optim}, placement="prenorm", num_layers=2)
        assert module.model is not None
        optimizer, batch = make_optimizer(module.model, module.optim_config), {"tokens": torch.arange(18).view(2, 9)}
        for _ in range(3):
            optimizer.zero_grad()
            module.compute_loss(batch)[0].backward()
            optimizer.step()
        return module.state_dict()

    torch.testing.assert_close(trained(depth_scaling="completep"), trained(), rtol=0, atol=0)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_it_is_for_placements_that_add_branches_as_they_are(name: str) -> None:
    config, optim = tiny_config(placement=name, num_layers=6), OptimConfig(depth_scaling="completep")
    if name in PLAIN:
        assert depth_scaling(config, optim).branch_multiplier == pytest.approx(1 / 3)
        return
    with pytest.raises(
        ConfigError, match=rf"optim\.depth_scaling='completep' .* model\.placement={name}: .* prenorm, subln"
    ):
        depth_scaling(config, optim)


@pytest.mark.parametrize("name", ["prenorm", "subln"])
def test_gpas_which_multiplies_the_stream_is_refused(name: str) -> None:
    config = tiny_config(placement=name, placement_options={"gpas": True})
    message = rf"completep' .* model\.placement={name} and model\.placement_options\.gpas=true: .* without gpas"
    with pytest.raises(ConfigError, match=message):
        depth_scaling(config, OptimConfig(depth_scaling="completep"))
    depth_scaling(
        tiny_config(placement=name, placement_options={"gpas": False}), OptimConfig(depth_scaling="completep")
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth_scaling": "completp"}, r"optim\.depth_scaling='completp' .*did you mean completep"),
        ({"base_num_layers": 0}, r"optim\.base_num_layers=0 .* an integer >= 1"),
        (
            {"depth_scaling": "completep", "optimizer": "torch.optim.SGD"},
            r"optim\.depth_scaling='completep' .* none with optim\.optimizer=torch\.optim\.SGD: .*adamw, lion, muon",
        ),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        depth_scaling(tiny_config(placement="prenorm"), parse(OptimConfig, "optim", values))


@pytest.mark.parametrize("placement", ["prenorm", "ihc", "gr"])
def test_an_update_is_as_large_at_any_depth_and_grows_without(placement: str) -> None:
    sizes = check_depth("dense", depths=(2, 8), placement=placement)
    for step in STEPS:
        assert spread(sizes, "completep", step, "logits", "update") < 1.15
    assert spread(sizes, "none", STEPS[0], "logits", "update") > 1.4  # later the final norm bounds it


@pytest.mark.parametrize("ffn", ["dense", "moe"])
@pytest.mark.parametrize("placement", sorted(PLAIN))
def test_an_export_has_the_factor_in_its_weights(placement: str, ffn: str) -> None:
    moe = {"num_shared_experts": 1} if placement == "subln" else {}
    config = tiny_config(placement=placement, num_layers=3, ffn=ffn, moe=moe)
    model, sequence = Transformer(config, VOCAB_SIZE, branch_multiplier=1 / 3), tokens(2, 9)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    expected = model(sequence)[0]
    theirs = PlacementForCausalLM(PlacementConfig(**remote_code.configuration(model))).eval()
    theirs.load_state_dict(remote_code.weights(model), strict=False)
    torch.testing.assert_close(theirs(sequence).logits, expected, rtol=1e-4, atol=1e-4)


def test_initialize_takes_the_models_depth_where_nothing_else_is_said() -> None:
    model = Transformer(tiny_config(placement="prenorm", init="megatron", num_layers=8), VOCAB_SIZE)
    initialize(model)
    assert model.blocks[0].attn.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)  # type: ignore[union-attr]
