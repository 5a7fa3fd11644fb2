"""Asks what the machine's memory can hold before a model's weights are made, and names it where it was not enough."""

import os
import re
from typing import Any

from core.compat import lacks_memory
from core.errors import InvalidValue, UserError, one_line

GIB = 2**30
LACK = "The memory is not enough"
"""How the error begins that ends a run whose machine or device had too little of it."""


def check_memory(trainer: Any, module: Any) -> None:
    """Refuse to train a model in the memory of a machine that cannot hold it, which Linux would kill for it.

    Counted are weights, gradients and what the optimizer keeps, two moments where the module does not say, of a process
    that holds the whole model; what else a run takes comes on top (python -m tools.plan). A GPU's memory needs no such
    check: its allocator says what it lacks.

    Args:
        trainer: the Trainer, not yet fitting.
        module: the LanguageModule, or one without `num_parameters`, of which nothing is known.

    Raises:
        ConfigError: names the number of parameters and both sizes.
    """
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

    parameters = getattr(module, "num_parameters", None)
    shared = isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy) and trainer.world_size > 1
    if parameters is None or shared or trainer.strategy.root_device.type != "cpu":
        return
    size = 2 if str(trainer.precision).endswith("-true") and "16" in str(trainer.precision) else 4
    kept = getattr(module, "num_optimizer_values", None)
    values = 2 * int(parameters[0]) + (kept() if kept is not None else 2 * int(parameters[0]))
    needed, held = size * values, memory_of_machine()
    if held is not None and needed > held:
        reason = (
            f"{parameters[0]:,} parameters with gradients and optimizer state take {needed / GIB:,.1f} GiB, "
            f"and this machine has {held / GIB:,.1f}; a smaller model.dim, model.num_layers or model.ffn_dim takes less"
        )
        raise InvalidValue("model.dim", module.model_config.dim, reason)


def memory_of_machine() -> int | None:
    """Return the bytes of memory and swap space of the machine; None where it does not say."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with open("/proc/meminfo") as file:
            swap = next((int(line.split()[1]) * 1024 for line in file if line.startswith("SwapTotal:")), 0)
    except (OSError, ValueError):
        return None
    return total + swap


def explain_lack(error: BaseException) -> UserError | None:
    """Return the error in words for the user where it says that memory was not enough; None where it does not."""
    if not lacks_memory(error):
        return None
    said = re.sub(r"^\[enforce fail .*?DefaultCPUAllocator: ", "", one_line(error)).partition(" If reserved but")[0]
    way = "data.batch_size, micro_batch_size, data.seq_len and the model's sizes decide: python -m tools.plan"
    return UserError(f"{LACK} ({said or type(error).__name__}); {way}")
