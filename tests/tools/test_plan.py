"""What is planned against what real steps take, and a 7B run planned in seconds."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from core.errors import ConfigError
from lightning_modules.layers import expert_products
from lightning_modules.optim import make_optimizer
from tests.conftest import make_module, tokens
from tools.plan import compose_config, plan

BATCH, SEQ_LEN = 4, 32
WIDE: dict[str, Any] = {"num_layers": 3, "dim": 64, "ffn_dim": 176}
MODELS: dict[str, dict[str, Any]] = {
    "dense": WIDE,
    "two streams, grouped queries": {**WIDE, "placement": "siamesenorm", "num_kv_heads": 2},
    "moe": {**WIDE, "ffn": "moe", "moe": {"expert_dim": 64, "num_shared_experts": 1}},
}


def planned(model: dict[str, Any]) -> Any:
    flat = {**{k: v for k, v in model.items() if k != "moe"}, "num_heads": 4}
    moe = {"num_experts": 4, "top_k": 2, "expert_dim": 24, **model.get("moe", {})}
    overrides = [f"model.{name}={value}" for name, value in flat.items()]
    overrides += [f"model.moe.{name}={value}" for name, value in moe.items()] if "moe" in model else []
    sizes = ["data=synthetic", "data.vocab_size=50", f"data.seq_len={SEQ_LEN}", f"data.batch_size={BATCH}"]
    return plan(compose_config([*overrides, *sizes]))


def experts_flops(x: Any, w: Any, *_: Any, **__: Any) -> int:
    """Each row of x [rows, p] times a matrix of w [experts, p, q]."""
    return 2 * x[0] * w[1] * w[2]


def outer_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


OPERATORS = getattr(torch.ops, expert_products.__name__.replace(".", "_"))
FORMULAS = {OPERATORS.loop_matmul: experts_flops, OPERATORS.loop_outer: outer_flops}


@pytest.mark.parametrize("name", MODELS)
def test_memory_and_flops_are_those_of_a_real_step(name: str) -> None:
    expected = planned(MODELS[name])
    module = make_module(**MODELS[name])
    model: Any = module.model
    optimizer = make_optimizer(model, module.optim_config)
    batch = tokens(BATCH, SEQ_LEN + 1)

    def loss() -> torch.Tensor:
        logits, _ = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    # The counter knows no attention kernel of a CPU; products it counts.
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as flops, sdpa_kernel(SDPBackend.MATH):
        loss().backward()
    optimizer.step()
    per_token = flops.get_total_flops() / (BATCH * SEQ_LEN)
    assert expected.flops_per_token == pytest.approx(per_token, rel=0.05)
    parameters = list(model.parameters())
    assert expected.weights == sum(p.nbytes for p in parameters)
    assert expected.gradients == sum(p.grad.nbytes for p in parameters)
    moments = sum(state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert expected.optimizer == moments

    optimizer.zero_grad()
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        value = loss()
        (now,) = tracker.get_tracker_snapshot("current").values()
    held = now["Total"] - expected.weights - expected.optimizer
    assert expected.activations == pytest.approx(held, rel=0.05)
    del value


def test_a_7b_run_is_planned_without_its_weights() -> None:
    eight = ["experiment=dense_7b", "trainer.precision=bf16-mixed", "trainer.devices=8"]
    whole, sharded = (plan(compose_config([*eight, f"trainer={name}"])) for name in ("ddp", "fsdp"))
    tensor = ["trainer=fsdp", "trainer.strategy.tensor_parallel_size=2", "micro_batch_size=2"]
    cut = plan(compose_config([*eight, *tensor]))
    blocks = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    norms, embeddings = (2 * 32 + 1) * 4096, 2 * 257 * 4096
    assert whole.parameters == sharded.parameters == blocks + norms + embeddings
    assert whole.weights == 4 * whole.parameters
    assert sharded.weights == 4 * (whole.parameters // 8)
    assert cut.weights == blocks // 2 + norms + embeddings, "4 bytes, of 4 processes"
    assert sharded.flops_per_token == 6 * (whole.parameters - embeddings // 2) + 12 * 32 * 4096 * 2048
    assert sharded.tokens == 100_000 * 512 * 2048
    seconds = sharded.flops_per_token * sharded.tokens / (0.4 * 8 * 989e12)
    assert sharded.hours(0.4, 989e12) == pytest.approx(seconds / 3600)
    assert sharded.activations < cut.activations < 2 * sharded.activations, "twice the sequences, half of the inside"


@pytest.mark.parametrize(
    ("override", "field"),
    [("trainer.devices=auto", "trainer.devices"), ("data.batch_size=3", "data.batch_size")],
)
def test_what_cannot_be_planned_is_refused(override: str, field: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(compose_config(["trainer=fsdp", "trainer.devices=2", override]))
    assert error.value.field == field
