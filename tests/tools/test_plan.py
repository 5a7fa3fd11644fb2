"""What is planned against what real steps take, and a 7B run planned in seconds."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from analysis.memory import peak_of_step, saved_activations
from core.device_peaks import known_peak
from core.errors import ConfigError
from lightning_modules.cross_entropy import LARGE_VOCABULARY
from lightning_modules.language_module import LanguageModule
from lightning_modules.layers import expert_products
from lightning_modules.optimizers import make_optimizer
from lightning_modules.transformer import Transformer
from tests.support.models import make_module, tiny_values, tokens
from tools.plan import (
    PRECISIONS,
    WITHOUT_TF32,
    Mesh,
    Plan,
    compose_config,
    gathered_bytes,
    largest_micro_batch,
    main,
    plan,
)

BATCH, SEQ_LEN = 4, 32
WIDE: dict[str, Any] = {"num_layers": 3, "dim": 64, "ffn_dim": 176}
MODELS: dict[str, dict[str, Any]] = {
    "dense": WIDE,
    "two streams, grouped queries": {**WIDE, "placement": "siamesenorm", "num_kv_heads": 2},
    **{name: {**WIDE, "placement": name} for name in ("mhc", "gr")},
    "hc": {**WIDE, "dim": 192, "ffn_dim": 512, "placement": "hc"},  # narrower, to mix streams is 8 % of its products
    "all sources": {**WIDE, "placement": "attnres"},
    "sources by groups": {**WIDE, "placement": "attnres", "placement_options": {"group": 4}},
    "moe": {**WIDE, "ffn": "moe", "moe": {"expert_dim": 64, "num_shared_experts": 1}},
    "large vocabulary": WIDE,
    "bf16-mixed": WIDE,
    "64-true": WIDE,
    "bf16-true": WIDE,
}


def vocab_size(name: str) -> int:
    """From LARGE_VOCABULARY on the logits never exist all at once."""
    return 2 * LARGE_VOCABULARY if name == "large vocabulary" else 50


def planned(name: str) -> Any:
    model = MODELS[name]
    flat = {**{k: v for k, v in model.items() if k != "moe"}, "num_heads": 4}
    moe = {"num_experts": 4, "top_k": 2, "expert_dim": 24, **model.get("moe", {})}
    flat |= {f"placement_options.{k}": v for k, v in flat.pop("placement_options", {}).items()}
    overrides = [f"model.{name}={value}" for name, value in flat.items()]
    overrides += [f"model.moe.{name}={value}" for name, value in moe.items()] if "moe" in model else []
    sizes = ["data=synthetic", "data.task=copy", f"data.vocab_size={vocab_size(name)}"]
    sizes += [f"data.seq_len={SEQ_LEN}", f"data.batch_size={BATCH}"]
    sizes += [f"trainer.precision={name}"] if name in PRECISIONS else []
    return plan(compose_config([*overrides, *sizes]))


def experts_flops(x: Any, w: Any, *_: Any, **__: Any) -> int:
    """Each row of x [rows, p] times a matrix of w [experts, p, q]."""
    return 2 * x[0] * w[1] * w[2]


def swiglu_flops(x: Any, w: Any, *_: Any, **__: Any) -> int:
    """Two products forward."""
    return 2 * experts_flops(x, w)


def swiglu_gradient_flops(grad: Any, *operands: Any, **__: Any) -> int:
    """Two for the gradient of each operand, of which two are matrices."""
    return 2 * swiglu_flops(*operands)


def outer_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


PRODUCTS, KERNELS = getattr(torch.ops, expert_products.__name__.replace(".", "_")), torch.ops.spannorm_cpu
FORMULAS = {
    PRODUCTS.loop_matmul: experts_flops,
    PRODUCTS.loop_outer: outer_flops,
    KERNELS.expert_swiglu: swiglu_flops,
    KERNELS.expert_swiglu_backward: swiglu_gradient_flops,
    torch.ops.aten.addmm_: lambda _, a, b, **__: outer_flops(a, b),
}


@pytest.mark.parametrize("name", MODELS)
def test_memory_and_flops_are_those_of_a_real_step(name: str) -> None:
    expected = planned(name)
    module = LanguageModule(tiny_values(**MODELS[name]), {"warmup_steps": 0}, vocab_size(name))
    module.configure_model()
    module.to(PRECISIONS[name].weights if name in PRECISIONS else torch.float32)
    model: Any = module.model
    optimizer = make_optimizer(model, module.optim_config)
    batch = {"tokens": torch.randint(vocab_size(name), (BATCH, SEQ_LEN + 1))}

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16-mixed"):
            return module.compute_loss(batch)[0]

    # The counter knows no attention kernel of a CPU; products it counts.
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as flops, sdpa_kernel(SDPBackend.MATH):
        loss().backward()
    optimizer.step()
    per_token = flops.get_total_flops() / (BATCH * SEQ_LEN)
    assert expected.flops_per_token == pytest.approx(per_token, rel=0.05)
    parameters = list(model.parameters())
    idle = 3 * (4 - 2) * 3 * 64 * 64 if name == "moe" else 0  # 3 layers, 2 of 4 experts, 3 matrices
    assert expected.active_parameters == expected.parameters - idle == sum(p.numel() for p in parameters) - idle
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


PEAKS: dict[str, dict[str, Any]] = {
    **{name: {**WIDE, "placement": name} for name in ("prenorm", "hc", "mhc", "ihc", "gr")},
    "attnres": {**WIDE, "placement": "attnres", "num_layers": 6},
    "attnres, by groups": {**WIDE, "placement": "attnres", "num_layers": 6, "placement_options": {"group": 4}},
    "attnres, bf16-mixed": {**WIDE, "placement": "attnres"},
    "moe": MODELS["moe"],
}


def measured_peak(values: dict[str, Any], dtype: torch.dtype | None, accumulated: bool) -> int:
    """The most bytes that the allocator gave out at once in a step, beside weights and the optimizer's state."""
    module = LanguageModule(tiny_values(**values), {"warmup_steps": 0}, 50)
    module.configure_model()
    assert module.model is not None

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = module.compute_loss({"tokens": torch.zeros(BATCH, SEQ_LEN + 1, dtype=torch.long)})[0]
        loss.backward()

    step()
    before = sum(p.nbytes for p in module.model.parameters()) if accumulated else 0
    if not accumulated:
        module.model.zero_grad()
    # oneDNN's scratch space depends on what the processor can do: its bf16 products have up to 5 % of the peak.
    plain = torch.backends.mkldnn.flags(enabled=False)
    with plain, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = before
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


WITHOUT_ONEDNN = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")


@WITHOUT_ONEDNN
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_a_step_is_what_the_allocator_gives_out(name: str, recomputed: bool) -> None:
    values = {**PEAKS[name], "activation_checkpointing": recomputed}
    dtype = torch.bfloat16 if name.endswith("bf16-mixed") else None
    config = make_module(**values).model_config
    rel = 0.08 if name == "moe" else 0.02  # of the gradient of experts' products, inside an operator, nothing is known
    for accumulated in (False, True) if name == "prenorm" else (False,):
        planned = peak_of_step(partial(Transformer, config, 50), BATCH, SEQ_LEN, False, dtype, accumulated=accumulated)
        assert planned == pytest.approx(measured_peak(values, dtype, accumulated), rel=rel)


@WITHOUT_ONEDNN
def test_memory_is_that_of_the_peak() -> None:
    small = ["data=synthetic", "data.batch_size=4", "data.seq_len=32", "data.task=copy", "data.vocab_size=50"]
    small += ["model.dim=64", "model.num_heads=4", "model.ffn_dim=176", "model.num_layers=3", "model.placement=attnres"]
    found = plan(compose_config([*small, "model.activation_checkpointing=true"]))
    values = {**WIDE, "placement": "attnres", "activation_checkpointing": True}
    expected = found.weights + found.optimizer + measured_peak(values, None, False)
    assert found.memory == pytest.approx(expected, rel=0.02)
    sharded = plan(compose_config([*small, "model.activation_checkpointing=true", "trainer=fsdp", "trainer.devices=2"]))
    assert sharded.peak < found.peak


@pytest.mark.parametrize("placement", ["prenorm", "attnres"])
def test_what_recomputed_blocks_hand_on_counts_once(placement: str) -> None:
    """A source goes into all blocks behind it, and is one tensor."""
    values = tiny_values(**WIDE, placement=placement, activation_checkpointing=True)
    module = LanguageModule(values, {"warmup_steps": 0}, 50)
    module.configure_model()
    model, batch = module.model, {"tokens": tokens(BATCH, SEQ_LEN + 1)}
    build = lambda: Transformer(replace(module.model_config, activation_checkpointing=False), 50)  # noqa: E731
    saved = saved_activations(build, BATCH, SEQ_LEN, chunked=False)
    one = BATCH * SEQ_LEN * WIDE["dim"] * 4
    assert saved.states == ([one] * 3 if placement == "prenorm" else [one, 2 * one, 2 * one])
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        value = module.compute_loss(batch)[0]
        (now,) = tracker.get_tracker_snapshot("current").values()
    held = now["Total"] - sum(p.nbytes for p in module.parameters())
    assert saved.outside + sum(saved.states) == pytest.approx(held, rel=0.05)
    del value


@pytest.mark.parametrize("optimizer", ["muon", "lion", "torch.optim.SGD"])
def test_what_another_optimizer_keeps_is_counted(optimizer: str) -> None:
    sizes = [
        "model.dim=64",
        "model.num_layers=2",
        "data=synthetic",
        "data.task=copy",
        "data.vocab_size=50",
        "data.seq_len=32",
    ]
    config = compose_config([*sizes, "trainer.precision=32-true", f"optim.optimizer={optimizer}"])
    module = LanguageModule(dict(config.model), {**config.optim}, 50)
    module.configure_model()
    model: Any = module.model
    made = make_optimizer(model, module.optim_config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    moments = [x for kept in made.state.values() for name, x in kept.items() if x is not None and name != "step"]
    assert plan(config).optimizer == sum(moment.nbytes for moment in moments)


@pytest.mark.parametrize(("size", "halved", "of_a_block"), [(4, False, 12), (4, True, 8), (2, False, 6)])
def test_bytes_that_are_gathered(size: int, halved: bool, of_a_block: int) -> None:
    """The weights of two blocks and the gradients of one; embedding, head and the last norm as they are."""
    model = Transformer(make_module(**WIDE).model_config, 50)
    largest = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    expected = size * 2 * 50 * 64 + of_a_block * largest
    assert gathered_bytes(model, Mesh(2, 1, sharded=True, reduced=False, halved=halved), size) == expected
    assert gathered_bytes(model, Mesh(1, 2, sharded=True, reduced=False, halved=halved), size) == 0


def test_weights_are_gathered_in_the_type_that_is_asked_for() -> None:
    job = ["data=synthetic", "data.vocab_size=50", "trainer=fsdp", "trainer.devices=2", "trainer.precision=bf16-mixed"]
    whole, half = (
        plan(compose_config([*job, f"trainer.strategy.param_dtype={name}"])) for name in ("float32", "bfloat16")
    )
    assert half.gathered < whole.gathered
    refused = compose_config([*job, "trainer.strategy.param_dtype=bfloat16", "trainer.precision=32-true"])
    with pytest.raises(ConfigError, match=r"trainer\.precision=32-true is not bf16-mixed"):
        plan(refused)


def test_a_run_of_the_7b_models_blocks_is_planned_without_its_weights() -> None:
    layers = 4
    eight = ["experiment=dense_7b", "trainer.devices=8", f"model.num_layers={layers}"]
    whole, sharded = (plan(compose_config([*eight, f"trainer={name}"]), 257) for name in ("ddp", "fsdp"))
    assert (sharded.precision, sharded.compiled) == (whole.precision, whole.compiled) == ("bf16-mixed", True)
    tensor = ["trainer=fsdp", "trainer.strategy.tensor_parallel_size=2", "micro_batch_size=16"]
    cut = plan(compose_config([*eight, *tensor]), 257)
    blocks = layers * (4 * 4096**2 + 3 * 4096 * 11008)
    norms, embeddings = (2 * layers + 1) * 4096, 2 * 257 * 4096
    assert whole.parameters == sharded.parameters == blocks + norms + embeddings
    assert whole.weights == 4 * whole.parameters
    assert sharded.weights == 4 * (whole.parameters // 8)
    assert cut.weights == blocks // 2 + norms + embeddings, "4 bytes, of 4 processes"
    # In a block are two norms, in the last one a third; of two blocks all is there, and the gradients of one.
    for planned, inside in ((sharded, blocks // layers), (cut, blocks // (2 * layers))):
        assert planned.gathered == 4 * (embeddings + 3 * (inside + 3 * 4096))
    assert whole.gathered == 0
    assert sharded.flops_per_token == 6 * (whole.parameters - embeddings // 2) + 12 * layers * 4096 * 2048
    assert sharded.tokens == 100_000 * 512 * 2048
    seconds = sharded.flops_per_token * sharded.tokens / (0.4 * 8 * 989e12)
    assert sharded.hours(0.4, 989e12) == pytest.approx(seconds / 3600)
    assert cut.hours(0.4, 989e12) == sharded.hours(0.4, 989e12)
    assert sharded.activations < cut.activations < 2 * sharded.activations, "twice the sequences, half of the inside"


SMALL = ["data=synthetic", "data.task=copy", "data.seq_len=64", "model.num_layers=2", "trainer.devices=2"]


@pytest.mark.parametrize("trainer", ["ddp", "fsdp", "slurm"])
def test_several_gpus_are_planned_in_bf16_and_several_cpus_in_fp32(trainer: str) -> None:
    devices = [*SMALL, f"trainer={trainer}"]
    gpus, cpus = plan(compose_config(devices)), plan(compose_config([*devices, "trainer.accelerator=cpu"]))
    assert (gpus.precision, gpus.compiled, cpus.precision, cpus.compiled) == ("bf16-mixed", True, "32-true", False)
    asked = plan(compose_config([*devices, "trainer.precision=32-true", "model.compile=false"]))
    assert (asked.precision, asked.compiled) == ("32-true", False)


@pytest.mark.parametrize(
    ("precision", "peak"), [("bf16-mixed", 989), ("bf16", 989), ("16-true", 989), ("32-true", 495), ("64-true", 67)]
)
def test_the_hours_follow_the_precision(precision: str, peak: int, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*SMALL, "trainer=fsdp", "trainer.max_steps=100000000", f"trainer.precision={precision}"]
    main(overrides)
    said = capsys.readouterr().out
    hours = plan(compose_config(overrides)).hours(0.4, peak * 1e12)
    assert f"{hours:,.1f} at 40% of {peak} TFLOP/s a device" in said
    main([*overrides, "peak_flops=1e12"])
    assert "of 1 TFLOP/s a device" in capsys.readouterr().out


def test_products_that_may_not_be_made_in_tf32_take_longer(capsys: pytest.CaptureFixture[str]) -> None:
    """And the peaks are those that MFU goes by."""
    main([*SMALL, "trainer=fsdp", "float32_matmul_precision=highest", "trainer.precision=32-true"])
    assert "of 67 TFLOP/s a device" in capsys.readouterr().out
    for name, precision in PRECISIONS.items():
        if name != "64-true":  # which core/device_peaks.py does not have
            assert precision.peak_flops == pytest.approx(known_peak("NVIDIA H100 80GB HBM3", name, tf32=True), rel=1e-3)
    assert pytest.approx(known_peak("NVIDIA H100 80GB HBM3", "32-true", tf32=False), rel=2e-3) == WITHOUT_TF32


MIXTURE = ["experiment=moe_spannorm", "data=synthetic", "data.batch_size=8", "model.moe.num_experts=4"]
MIXTURE += ["model.num_layers=2", "trainer.accumulate_grad_batches=2", "data.seq_len=16"]


@pytest.mark.parametrize(
    ("overrides", "copies"),
    [
        (["trainer.precision=32-true"], 9 * 2 * 2),
        (["trainer.precision=16-mixed"], 9 * 2 * 2),
        (["trainer.precision=32-true", "micro_batch_size=2"], 9 * 2 * 2 * 4),
        (["trainer.precision=32-true", "model.moe.num_experts=8"], 9 * 2 * 2),
        (["trainer.precision=32-true", "model.moe.backend=loop"], 0),
        (["trainer.precision=bf16-mixed"], 0),
        (["trainer.precision=32-true", "trainer.accelerator=cpu"], 0),
    ],
)
def test_copies_to_the_host_are_those_of_grouped_products_outside_bf16(overrides: list[str], copies: int) -> None:
    assert plan(compose_config([*MIXTURE, *overrides])).host_copies == copies


@pytest.mark.parametrize("every", [None, 1, 2])
def test_there_is_one_for_each_grouped_product(every: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    recomputed: dict[str, Any] = (
        {} if every is None else {"activation_checkpointing": True, "activation_checkpoint_every": every}
    )
    products: list[Any] = []
    plain = F.grouped_mm

    def grouped_mm(*tensors: Any, **options: Any) -> Any:
        products.append(plain)
        return plain(*tensors, **options)

    monkeypatch.setattr(F, "grouped_mm", grouped_mm)
    module = make_module(ffn="moe", moe={"backend": "grouped", "num_experts": 4}, num_layers=2, **recomputed)
    module.compute_loss({"tokens": tokens(2, 9)})[0].backward()
    overrides = [f"model.{name}={value}" for name, value in recomputed.items()]
    config = compose_config([*MIXTURE, "trainer.accumulate_grad_batches=1", "trainer.precision=32-true", *overrides])
    assert plan(config).host_copies == len(products)


def test_the_micro_batch_that_fits_is_the_largest_one(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data=synthetic", "data.batch_size=8", "model.num_layers=1", "trainer=fsdp", "trainer.devices=2"]

    def memory(size: int) -> int:
        return plan(compose_config([*overrides, f"micro_batch_size={size}"])).memory

    room = {size: memory(size) / 0.9e9 for size in (1, 2, 4)}
    for size in (2, 4):
        assert largest_micro_batch(compose_config(overrides), 1.0001 * room[size]) == size
    assert largest_micro_batch(compose_config(overrides), 0.999 * room[1]) is None
    main([*overrides, f"device_gb={1.0001 * room[2]}"])
    assert "micro_batch_size=2" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"device_gb=0\.0 is not valid"):
        main([*overrides, "device_gb=0"])


def test_a_corpus_that_is_not_here_is_planned_by_its_vocabulary() -> None:
    config = compose_config(["experiment=dense_7b", "trainer=fsdp", "trainer.devices=8", "model.num_layers=1"])
    with pytest.raises(ConfigError, match=r"assumed_vocab_size=None .*data/slimpajama/index.json cannot be read"):
        plan(config)
    assert plan(config, 32768).parameters - plan(config, 257).parameters == 2 * 4096 * (32768 - 257)


def test_what_a_setting_changes() -> None:
    def of(*overrides: str) -> Plan:
        return plan(compose_config(["data=synthetic", "data.batch_size=4", "model.num_layers=2", *overrides]))

    plain, half = of(), of("trainer.precision=bf16-true")
    one, micro = of("data.batch_size=1"), of("micro_batch_size=1")
    assert micro == one._replace(tokens=plain.tokens, peak=micro.peak)
    thrice = of("trainer.accumulate_grad_batches=3")
    assert thrice == plain._replace(tokens=3 * plain.tokens, peak=thrice.peak)
    for passes, single in ((micro, one), (thrice, plain)):
        assert single.peak < passes.peak <= single.peak + single.gradients, "gradients are there from the beginning"
    assert [2 * size for size in half[2:6]] == list(plain[2:6]), "weights, gradients, buckets, optimizer"
    double = of("trainer.precision=64-true")
    assert list(double[2:6]) == [2 * size for size in plain[2:6]]
    assert half.activations < 0.9 * plain.activations < 0.9 * 0.7 * double.activations
    two = of("trainer=fsdp", "trainer.devices=2")
    assert of("trainer=fsdp", "trainer.devices=1", "trainer.num_nodes=2") == two
    assert plain.hours(0.4, 1e12) == pytest.approx(2 * two.hours(0.4, 1e12))
    assert two.memory == two.weights + two.optimizer + two.peak + two.gathered


def test_buckets_are_those_of_ddp() -> None:
    module, found = make_module(**WIDE), []

    def note(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        found.append((bucket.buffer().nbytes, bucket.buffer().data_ptr()))
        reduced: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        reduced.set_result(bucket.buffer())
        return reduced

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model = DistributedDataParallel(module.model)
        model.register_comm_hook(None, note)
        model(tokens(BATCH, SEQ_LEN))[0].mean().backward()
    finally:
        dist.destroy_process_group()
    gradients = {p.grad.data_ptr() for p in model.parameters()}
    assert not gradients & {pointer for _, pointer in found}, "beside them"
    sizes = ["model.num_layers=3", "model.dim=64", "model.num_heads=4", "model.ffn_dim=176", "data=synthetic"]
    sizes += ["data.vocab_size=50", "data.batch_size=4", "data.seq_len=32"]
    one, ddp, fsdp = (
        plan(compose_config([*sizes, *trainer]))
        for trainer in ([], ["trainer=ddp", "trainer.devices=2"], ["trainer=fsdp", "trainer.devices=2"])
    )
    assert (one.buckets, ddp.buckets, fsdp.buckets) == (0, sum(size for size, _ in found), 0)
    assert ddp.memory == ddp.weights + ddp.gradients + ddp.optimizer + ddp.peak


def test_blocks_that_are_not_recomputed_keep_all() -> None:
    model = ["model.num_layers=4", "data=synthetic", "model.activation_checkpointing=true"]
    none, every, second = (
        plan(compose_config([*model, override])).activations
        for override in (
            "model.activation_checkpointing=false",
            "model.activation_checkpoint_every=1",
            "model.activation_checkpoint_every=2",
        )
    )
    assert every < second < none
    model[0] = "model.num_layers=1"
    one = compose_config([*model, "data.batch_size=4"])
    whole = compose_config([*model, "data.batch_size=4", "model.activation_checkpointing=false"])
    block_input = 4 * 4 * one.data.seq_len * one.model.dim
    assert plan(one).activations == plan(whole).activations + block_input, "the block is whole while it is redone"


MOE = ["experiment=moe_spannorm", "model.moe.num_experts=4"]
SHARED = ["model.moe.num_shared_experts=1", "model.moe.shared_expert_dim=25"]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["trainer.devices=auto"], "trainer.devices"),
        (["trainer.precision=bf15"], "trainer.precision"),
        (["trainer.devices=0"], "trainer.devices"),
        (["data.batch_size=3"], "data.batch_size"),
        (["data.batch_size=4", "micro_batch_size=3"], "micro_batch_size"),
        (["trainer.strategy.tensor_parallel_size=0"], "trainer.strategy.tensor_parallel_size"),
        (["trainer.strategy.tensor_parallel_size=3"], "trainer.strategy.tensor_parallel_size"),
        (["trainer.strategy.tensor_parallel_size=2", "model.num_kv_heads=1"], "trainer.strategy.tensor_parallel_size"),
        (["trainer.strategy.tensor_parallel_size=2", "model.ffn_dim=97"], "trainer.strategy.tensor_parallel_size"),
        ([*MOE, *SHARED, "trainer.strategy.tensor_parallel_size=2"], "trainer.strategy.tensor_parallel_size"),
        ([*MOE, "model.moe.expert_parallel=4"], "model.moe.expert_parallel"),
        ([*MOE, "model.moe.expert_parallel=2", "trainer=ddp"], "model.moe.expert_parallel"),
    ],
)
def test_what_training_would_refuse_is_not_planned(overrides: list[str], field: str) -> None:
    base = [] if "trainer=ddp" in overrides else ["trainer=fsdp"]
    with pytest.raises(ConfigError) as error:
        plan(compose_config([*base, "trainer.devices=2", *overrides]))
    assert error.value.field == field


@pytest.mark.parametrize(
    ("overrides", "name"),
    [(["experiment=dense_spannorm", "assumed_vocab_size=257"], "token"), (["experiment=vision_spannorm"], "position")],
)
def test_what_is_counted_has_its_name(overrides: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(overrides)
    out = capsys.readouterr().out
    assert f"FLOPs per {name} " in out
    assert f" {name}s " in out
