"""The one file that knows the megablocks package: its dropless experts behind the interface of ours.

Only its expert computation is used. Routing and losses are this project's, so nothing goes through its global lists.
The package is never required: docs/megablocks.md says how to install it where there is a CUDA device.
"""

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from core.errors import require
from lightning_modules.config import ModelConfig
from lightning_modules.layers import expert_parallel


def obstacle(config: ModelConfig, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Return what keeps MegaBlocks from computing this configuration's experts, or None.

    Args:
        config: the layer's.
        device: where it will run; meta: not known yet.
        dtype: of the products; None: not known yet.
    """
    install = "docs/megablocks.md says how to install it"
    if device.type not in ("cuda", "meta") or not torch.cuda.is_available():
        return f"needs a CUDA device; {install}"
    for name in ("grouped_gemm", "megablocks.layers.dmoe"):  # in this order: the second warns without the first
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"cannot be imported ({error}); {install}"
    if dtype not in (None, torch.bfloat16):
        return f"computes in bf16 only, not in {dtype}: trainer.precision=bf16-mixed or bf16-true"
    if config.moe.num_experts * config.expert_hidden_dim < 128:
        return "needs num_experts x expert_dim >= 128"  # or its index arithmetic fails
    return None


def fill_gradients_without_tokens() -> None:
    """Let grouped_gemm give zeros as the gradient of an expert without tokens, once a process.

    It skips such an expert and leaves its part of the result as the memory was (tgale96/grouped_gemm, issue 36), which
    MegaBlocks hands on as a gradient.
    """
    backend = importlib.import_module("grouped_gemm").backend
    plain = backend.gmm
    if hasattr(plain, "__wrapped__"):
        return

    @functools.wraps(plain)
    def gmm(
        a: Tensor,
        b: Tensor,
        batch_sizes: Tensor,
        trans_a: bool = False,
        trans_b: bool = False,
        c: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = plain(a, b, batch_sizes, trans_a, trans_b, c)
        if trans_a:  # [experts, ...]; the sizes are on the host
            for expert in (batch_sizes == 0).nonzero().flatten().tolist():
                out[expert].zero_()
        return out

    backend.gmm = gmm


def make_experts(config: ModelConfig) -> Any:
    """Make MegaBlocks' ParallelDroplessMLP with grouped SwiGLU, used as an `experts.Experts` is."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    fill_gradients_without_tokens()

    class MegaBlocksExperts(ParallelDroplessMLP):
        @torch.compiler.disable  # it is not made for being traced: compile around it
        def forward(self, x: Tensor, weights: Tensor, experts: Tensor, tokens_per_expert: Tensor) -> Tensor:
            """Return outputs [tokens, dim] for weights and experts [tokens, k]; MegaBlocks counts the tokens."""
            rows = x
            if torch.is_autocast_enabled(x.device.type):  # before the tokens are copied to their experts
                rows = x.to(torch.get_autocast_dtype(x.device.type))
            wrong = rows.is_cuda and rows.dtype != torch.bfloat16
            valid = "bf16-mixed or bf16-true with model.moe.backend=megablocks: its products are bf16 only"
            require(not wrong, "trainer.precision", str(rows.dtype), valid)
            scores = weights  # stand in for all scores, which only its load-balancing loss would read
            return super().forward(rows, scores, weights, experts).to(x.dtype)

        def shard(self, mesh: DeviceMesh) -> None:
            """See `experts.Experts.shard`; MegaBlocks divides the gradients by itself."""
            self.args.moe_expert_model_parallelism = True
            self.args.expert_parallel_group = mesh.get_group()
            self.forward_fn = self.parallel_forward_once
            self.mlp.gradient_scale = 1 / mesh.size()
            expert_parallel.shard(self.mlp, mesh)

        def __reduce__(self) -> tuple[Any, ...]:
            """Say how a copy is made: as this one was. A class made in a function cannot be found by its name."""
            return make_experts, (config,), self.__dict__

    layer = MegaBlocksExperts(
        Arguments(
            hidden_size=config.dim,
            ffn_hidden_size=config.expert_hidden_dim,
            moe_num_experts=config.moe.num_experts,
            moe_top_k=config.moe.top_k,
            moe_loss_weight=0.0,
            mlp_type="glu",
            mlp_impl="grouped",
            memory_optimized_mlp=True,
            activation_fn=F.silu,
            bias=False,
            fp16=False,  # with bf16=False too, the weights get torch's default dtype
            init_method=_leave,
            output_layer_init_method=_leave,
            device=torch.get_default_device(),
        )
    )
    for name in ("w1", "v1", "w2"):  # in this order, as in ExpertMLP: optimizer states go by number
        parameter = layer.mlp.get_parameter(name)
        delattr(layer.mlp, name)
        layer.mlp.register_parameter(name, parameter)
    return layer


def _leave(weight: Tensor) -> None:
    """Leave a weight as it is: initializing is the model's."""
