"""Several processes: which of the data is whose, and how the global batch stays the same at any number of them."""

from typing import Any

import lightning as L

from core.errors import require


def num_data_parts(trainer: L.Trainer) -> int:
    """In how many parts a batch goes to the processes; those that cut one model have the same part."""
    return trainer.world_size // _cut(trainer)


def data_part(trainer: L.Trainer) -> int:
    """The number of this process's part of a batch."""
    return trainer.global_rank // _cut(trainer)


def _cut(trainer: L.Trainer) -> int:
    """How many processes share one copy of the model."""
    size: int = getattr(trainer.strategy, "tensor_parallel_size", 1)
    return size


def accumulate(trainer: L.Trainer, datamodule: Any, micro_batch_size: int | None) -> None:
    """Split each forward pass that the configuration asks for into as many as the devices need, in place.

    The sequences of an optimizer step, those of a validation and all intervals stay what they are. A mean over tokens
    does not notice; the mixtures' load-balancing loss, which is no such mean, is taken over smaller batches.

    Args:
        trainer: not yet fitting.
        datamodule: prepared.
        micro_batch_size: sequences that a device takes at once; None: its whole part of data.batch_size.

    Raises:
        ConfigError: the processes do not divide into groups that cut a model, the batch not into equal parts for them,
            or a part not into equal passes.
    """
    world, cut = trainer.world_size, _cut(trainer)
    valid = f"a divisor of {world}, the number of processes"
    require(world % cut == 0, "trainer.strategy.tensor_parallel_size", cut, valid)
    if not hasattr(datamodule, "batch_size"):
        return
    size, parts = datamodule.batch_size, num_data_parts(trainer)
    valid = f"a multiple of {parts}, the number of data-parallel processes: {_multiples_near(size, parts)}"
    require(size % parts == 0, "data.batch_size", size, valid)
    if micro_batch_size is None:
        return
    share = size // parts
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    valid = f"null, or one of {divisors}: {parts} data-parallel processes take {share} each of data.batch_size={size}"
    require(micro_batch_size in divisors, "micro_batch_size", micro_batch_size, valid)
    passes = share // micro_batch_size
    datamodule.val_batches = datamodule.num_val_batches * passes
    datamodule.batch_size = size // passes
    trainer.accumulate_grad_batches *= passes
    assert isinstance(trainer.val_check_interval, int), "check_length comes first"
    trainer.val_check_interval *= passes


def _multiples_near(size: int, parts: int) -> str:
    below = size // parts * parts
    return " or ".join(str(n) for n in (below, below + parts) if n)
