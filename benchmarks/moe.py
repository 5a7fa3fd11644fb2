"""One MoE layer, forward and backward, against other ways to compute it; and what more experts cost a training step.

    python -m benchmarks.moe                     CPU, fp32; writes results/moe-cpu.md
    python -m benchmarks.moe device=cuda         bf16, with MegaBlocks where it is installed; results/moe-cuda.md

All contenders have the same weights and inputs, make the balance loss as training does (Hugging Face's by its own
function), and agree on outputs and gradients before anything is timed. They take turns (A B C A B C ...), so that the
machine's drift hits all alike; a ratio is the median of those within a round. Ours make the router's z-loss and health
as well, which the others do not have.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import (
    MixtralConfig,
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)

from benchmarks.measure import Step, check_counts, machine, ratio, take_turns, timed
from core import cli
from core.errors import ConfigError, require
from lightning_modules.config import ModelConfig, OptimConfig, parse
from lightning_modules.initialization import initialize
from lightning_modules.layers.cpu_kernels.allocator import keep_freed_memory
from lightning_modules.layers.moe import MoE
from lightning_modules.optimizers import make_optimizer
from lightning_modules.transformer import Transformer

TOP_K, VOCAB_SIZE, BALANCE_WEIGHT = 2, 512, 0.01


@dataclass(frozen=True)
class MoEBenchmarkConfig:
    """Holds the fields that `python -m benchmarks.moe` takes.

    Attributes:
        device: the device that all compute on.
        experts: numbers of experts, of which each gets its rows.
        tokens: the number of tokens, a multiple of 256.
        dim: the width of the model.
        hidden: the width of an expert.
        layers: the number of layers in the model whose training step is timed.
        rounds: the number of rounds, in each of which all take a step.
        threads: the number of threads that compute.
        output: the report; null: results/moe-DEVICE.md.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    experts: tuple[int, ...] = (8, 32, 64)
    tokens: int = 2048
    dim: int = 256
    hidden: int = 344
    layers: int = 8
    rounds: int = 20
    threads: int = 1
    output: Path | None = None

    def __post_init__(self) -> None:
        require(len(self.experts) > 0, "experts", "", "an integer, or several with commas between them")
        check_counts(self, experts=TOP_K, dim=1, hidden=1, layers=1, rounds=1, threads=1)
        require(self.tokens >= 256 and self.tokens % 256 == 0, "tokens", self.tokens, "a multiple of 256")


class Setting(NamedTuple):
    """Says what the contenders compute: a layer's sizes, and whether the experts' popularity follows Zipf's law."""

    num_experts: int
    tokens: int
    dim: int
    hidden: int
    skewed: bool
    device: str

    @property
    def flops(self) -> int:
        """Return the FLOPs of the experts' products, forward and backward."""
        return 6 * self.tokens * TOP_K * 3 * self.dim * self.hidden


class PaddedBMM(nn.Module):
    """Every expert's tokens padded to the busiest one's number, then batched products; dropless."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        tokens, mlp = x.flatten(0, -2), self.layer.experts.mlp
        weights, experts, stats = self.layer.router(tokens)
        counts = stats.tokens_per_expert.long()
        order = experts.flatten().argsort(stable=True)
        owner = experts.flatten().index_select(0, order)
        capacity = int(counts.max())
        slots = owner * capacity + torch.arange(len(order), device=x.device) - (counts.cumsum(0) - counts)[owner]
        padded = x.new_zeros(len(counts) * capacity, x.size(-1)).index_copy(0, slots, tokens[order // TOP_K])
        w1, v1, w2 = (w.to(x.dtype).unflatten(0, (len(counts), -1)) for w in (mlp.w1, mlp.v1, mlp.w2))
        padded = padded.unflatten(0, (len(counts), -1))
        hidden = F.silu(torch.bmm(padded, w1.mT)) * torch.bmm(padded, v1.mT)
        out = torch.bmm(hidden, w2).flatten(0, 1).index_select(0, slots)
        out = (out * weights.flatten()[order, None]).to(x.dtype)
        return torch.zeros_like(tokens).index_add_(0, order // TOP_K, out).view_as(x), stats


class Mixtral(nn.Module):
    """Hugging Face's block, and the balance loss that its model makes of the router's logits."""

    def __init__(self, block: MixtralSparseMoeBlock) -> None:
        super().__init__()
        self.block = block
        self.logits: Tensor | None = None
        block.gate.register_forward_hook(self._keep)

    def _keep(self, gate: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        self.logits = outputs[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, logits = self.block(x), self.logits
        assert logits is not None
        loss = load_balancing_loss_func((logits,), self.block.gate.num_experts, TOP_K)
        assert isinstance(loss, Tensor)
        return out, loss / TOP_K


def autocast(device: str) -> torch.autocast:
    """Cast to bf16 on a GPU, by which the backend is chosen too; to nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda")


def make_layer(setting: Setting, backend: str) -> MoE:
    moe = {"num_experts": setting.num_experts, "top_k": TOP_K, "expert_dim": setting.hidden, "backend": backend}
    with torch.device(setting.device), autocast(setting.device):
        return MoE(parse(ModelConfig, "model", {"dim": setting.dim, "ffn": "moe", "moe": moe}))


def make_mixtral(layer: MoE, setting: Setting, implementation: str) -> nn.Module:
    """Make Hugging Face's block with the weights of ours."""
    sizes: dict[str, Any] = {
        "hidden_size": setting.dim,
        "intermediate_size": setting.hidden,
        "num_local_experts": setting.num_experts,
    }
    config = MixtralConfig(**sizes, num_experts_per_tok=TOP_K, router_jitter_noise=0.0)
    config._experts_implementation = implementation
    block, mlp = MixtralSparseMoeBlock(config).to(setting.device), layer.experts.mlp
    w1, v1, w2 = (weight.detach().unflatten(0, (setting.num_experts, -1)) for weight in (mlp.w1, mlp.v1, mlp.w2))
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.layer.weight)
        block.experts.gate_up_proj.copy_(torch.cat((w1, v1), dim=1))
        block.experts.down_proj.copy_(w2.mT)
    return Mixtral(block)


def contenders(setting: Setting) -> dict[str, nn.Module]:
    """Return the contenders by name; the first is what the others are compared with."""
    names = ["loop", "grouped"] if setting.device == "cpu" else ["grouped", "loop", "megablocks"]
    layers: dict[str, nn.Module] = {}
    for name in names:
        try:
            layers[name] = make_layer(setting, name)
        except ConfigError as error:
            print(f"left out: {error}")
    ours = layers[names[0]]
    assert isinstance(ours, MoE)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)
    if setting.skewed:  # the inputs' first feature is 1: a logit of -log(rank) each
        ranks = torch.arange(1, setting.num_experts + 1, device=setting.device)
        ours.router.layer.weight.data[:, 0] = -ranks.log()
    for layer in layers.values():
        layer.load_state_dict(ours.state_dict())
    layers["padded bmm"] = PaddedBMM(ours)
    # Not batched_mm, which copies its expert's weights for every token: 13 s a step where the others take 0.1 s.
    for implementation in ("eager", "grouped_mm"):
        layers[f"Mixtral, {implementation}"] = make_mixtral(ours, setting, implementation)
    return layers


def make_steps(layers: dict[str, nn.Module], setting: Setting) -> Iterator[tuple[str, Step]]:
    """Return forward and backward of each, after holding its output and input gradient against the first one's."""
    dtype = torch.float32 if setting.device == "cpu" else torch.bfloat16
    x = torch.randn(1, setting.tokens, setting.dim, device=setting.device)
    x[..., 0] = 1.0
    x, direction = x.requires_grad_(), torch.randn_like(x)
    expected: tuple[Tensor, Tensor] | None = None
    for name, layer in layers.items():
        layer.to(dtype)

        def step(layer: nn.Module = layer) -> tuple[Tensor, Tensor]:
            layer.zero_grad()
            inputs = x.detach().to(dtype).requires_grad_()
            out, balance = layer(inputs)
            balance = balance if isinstance(balance, Tensor) else balance.load_balancing_loss
            torch.autograd.backward((out, BALANCE_WEIGHT * balance), (direction.to(dtype), None))
            assert inputs.grad is not None
            return out.detach(), inputs.grad

        results = step()
        expected = expected or results
        for actual, wanted in zip(results, expected, strict=True):
            error = ((actual - wanted).norm() / wanted.norm()).item()
            assert error < (1e-4 if dtype == torch.float32 else 0.05), f"{name} is off by {error}"
        yield name, step


def layer_table(settings: MoEBenchmarkConfig) -> Iterator[str]:
    """Return one row per setting and contender."""
    yield "| experts | load | max / mean load | | ms | of the first | tokens/s | TFLOP/s |"
    yield "|---|---|---|---|---|---|---|---|"
    for num_experts in settings.experts:
        for skewed in (False, True):
            sizes = (settings.tokens, settings.dim, settings.hidden)
            setting = Setting(num_experts, *sizes, skewed, settings.device)
            layers = contenders(setting)
            steps = {name: timed(step, settings.device) for name, step in make_steps(layers, setting)}
            seconds = take_turns(steps, settings.rounds)
            load = max_over_mean(next(iter(layers.values())), setting)
            for name, values in seconds.items():
                median = statistics.median(values)
                relative = ratio(values, next(iter(seconds.values())))
                yield (
                    f"| {num_experts} | {'skewed' if skewed else 'balanced'} | {load:.2f} | {name} "
                    f"| {1e3 * median:.2f} | {relative:.2f} | {setting.tokens / median:,.0f} "
                    f"| {setting.flops / median / 1e12:.3f} |"
                )


@torch.no_grad()
def max_over_mean(layer: nn.Module, setting: Setting) -> float:
    x = torch.randn(1, setting.tokens, setting.dim, device=setting.device)
    x[..., 0] = 1.0
    counts = layer(x.to(next(layer.parameters()).dtype))[1].tokens_per_expert
    return (counts.max() / counts.mean()).item()


def make_training_step(num_experts: int, settings: MoEBenchmarkConfig) -> Step:
    """Return a whole model's step, optimizer included; active parameters do not depend on the number of experts."""
    moe = {"num_experts": num_experts, "top_k": TOP_K, "expert_dim": settings.hidden}
    values = {"ffn": "moe", "num_layers": settings.layers, "dim": settings.dim, "num_heads": 4, "moe": moe}
    with torch.device(settings.device), autocast(settings.device):
        model = Transformer(parse(ModelConfig, "model", values), VOCAB_SIZE)
    initialize(model)
    optimizer = make_optimizer(model, OptimConfig())
    tokens = torch.randint(VOCAB_SIZE, (settings.tokens // 256, 257), device=settings.device)

    def step() -> None:
        with autocast(settings.device):
            logits, stats = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        (loss + BALANCE_WEIGHT * sum(s.load_balancing_loss for s in stats)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_table(settings: MoEBenchmarkConfig) -> Iterator[str]:
    few, many = min(settings.experts), max(settings.experts)
    steps = {str(n): timed(make_training_step(n, settings), settings.device) for n in (few, many)}
    seconds = take_turns(steps, settings.rounds)
    yield f"| experts | ms per training step | of {few} experts |"
    yield "|---|---|---|"
    for name, values in seconds.items():
        yield f"| {name} | {1e3 * statistics.median(values):.1f} | {ratio(values, seconds[str(few)]):.2f} |"


@cli.tool
def main(settings: MoEBenchmarkConfig) -> None:
    keep_freed_memory()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    head = (
        f"# One MoE layer on {settings.device}, forward and backward\n\n"
        f"`python -m benchmarks.moe device={settings.device} threads={settings.threads}`: top-{TOP_K}, "
        f"{settings.tokens} tokens, dim {settings.dim}, experts of width {settings.hidden}, "
        f"{'fp32' if settings.device == 'cpu' else 'bf16'}; medians of {settings.rounds} rounds in which all take "
        f"turns.\ntorch {torch.__version__}, transformers {transformers.__version__}; {machine(settings.device)}.\n"
    )
    print(head)
    lines = [head]
    titles = ("## The layer\n", f"\n## A training step of {settings.layers} blocks at equal active parameters\n")
    for title, table in zip(titles, (layer_table, step_table), strict=True):
        lines.append(title)
        print(title)
        for line in table(settings):
            lines.append(line)
            print(line, flush=True)
    output = settings.output or Path(f"results/moe-{settings.device}.md")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    cli.run(main)
