"""The resolver `on_gpu` of configurations: ${on_gpu:${trainer.accelerator},A,B} is A where the run trains on GPUs."""

from typing import Any

from omegaconf import OmegaConf


def on_gpu(accelerator: str, value: Any, otherwise: Any) -> Any:
    """Return `value` where `trainer.accelerator` means CUDA devices, `otherwise` on anything else.

    `auto` means them where this machine has some. tools.plan, which is asked on machines without, says `gpu` for it.
    """
    if accelerator == "auto":
        import torch  # here, so that composing a configuration does not wait for it

        return value if torch.cuda.is_available() else otherwise
    return value if accelerator in ("gpu", "cuda") else otherwise


def register_resolver() -> None:
    """Make it known to OmegaConf, once a process."""
    OmegaConf.register_new_resolver("on_gpu", on_gpu, replace=True)
