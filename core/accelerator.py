"""Says what a configuration has of GPUs alone: the resolver `on_gpu`, and how exact products in fp32 are there."""

from typing import Any

from omegaconf import OmegaConf

from core.errors import require

MATMUL_PRECISIONS = {"highest": "fp32", "high": "TF32", "medium": "TF32"}
"""Values of float32_matmul_precision, and what a CUDA device multiplies fp32 in."""


def on_gpu(accelerator: str, value: Any, otherwise: Any) -> Any:
    """Return `value` where `trainer.accelerator` means CUDA devices, `otherwise` on anything else: the resolver of
    ${on_gpu:${trainer.accelerator},A,B}.

    `auto` means them where this machine has some. tools.plan, which is asked on machines without, says `gpu` for it.
    """
    if accelerator == "auto":
        import torch  # here, so that composing a configuration does not wait for it

        return value if torch.cuda.is_available() else otherwise
    return value if accelerator in ("gpu", "cuda") else otherwise


def register_resolver() -> None:
    """Make it known to OmegaConf, once a process."""
    OmegaConf.register_new_resolver("on_gpu", on_gpu, replace=True)


def check_matmul_precision(precision: object) -> None:
    """Refuse what torch.set_float32_matmul_precision does not take.

    Raises:
        ConfigError: names the three that it takes.
    """
    known = isinstance(precision, str) and precision in MATMUL_PRECISIONS
    require(known, "float32_matmul_precision", precision, f"one of {', '.join(MATMUL_PRECISIONS)}")


def set_matmul_precision(trainer: Any, precision: str) -> None:
    """Set how exact the products of fp32 are where the run trains on a CUDA device, and say so; on a CPU they stay.

    Args:
        trainer: the run's.
        precision: one of MATMUL_PRECISIONS.
    """
    import torch

    if trainer.strategy.root_device.type != "cuda":
        return
    torch.set_float32_matmul_precision(precision)
    if trainer.is_global_zero:
        print(f"Products of fp32 are made in {MATMUL_PRECISIONS[precision]}: float32_matmul_precision={precision}")
