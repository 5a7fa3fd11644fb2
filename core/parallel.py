"""Several processes: which of the data is whose, and how the global batch stays the same at any number of them."""

from typing import Any

import lightning as L

from core.errors import require

LISTED = 4096
"""The largest part of a batch of which all divisors are listed."""


def num_data_parts(trainer: L.Trainer) -> int:
    """Return in how many parts a batch goes to the processes; those that cut one model have the same part."""
    return trainer.world_size // _processes_per_model(trainer)


def data_part(trainer: L.Trainer) -> int:
    """Return the number of this process's part of a batch."""
    return trainer.global_rank // _processes_per_model(trainer)


def _processes_per_model(trainer: L.Trainer) -> int:
    """Return how many processes share one copy of the model."""
    size: int = getattr(trainer.strategy, "tensor_parallel_size", 1)
    return size


def apply_micro_batching(trainer: L.Trainer, datamodule: Any, micro_batch_size: int | None) -> None:
    """Split each forward pass that the configuration asks for into as many as the devices need, in place.

    The sequences of an optimizer step, those of a validation and all intervals stay what they are. A mean over tokens
    does not notice; the mixtures' load-balancing loss, which is no such mean, is taken over smaller batches.

    Args:
        trainer: not yet fitting.
        datamodule: prepared.
        micro_batch_size: sequences that a device takes at once; None: its whole part of data.batch_size.

    Raises:
        ConfigError: see `num_passes`.
    """
    passes = num_passes(
        trainer.world_size, _processes_per_model(trainer), getattr(datamodule, "batch_size", None), micro_batch_size
    )
    if passes == 1:
        return
    datamodule.val_batches = datamodule.num_val_batches * passes
    datamodule.batch_size //= passes
    for name in ("accumulate_grad_batches", "val_check_interval", "limit_train_batches", "limit_val_batches"):
        batches = getattr(trainer, name)
        if isinstance(batches, int):  # and no share of what there is
            setattr(trainer, name, batches * passes)


def check_parts(trainer: L.Trainer, datamodule: Any, micro_batch_size: int | None) -> int:
    """Refuse what `apply_micro_batching` would, before a corpus is written.

    Returns:
        Into how many forward passes it will split each one.

    Raises:
        ConfigError: see `num_passes`.
    """
    return num_passes(
        trainer.world_size, _processes_per_model(trainer), getattr(datamodule, "batch_size", None), micro_batch_size
    )


def num_models(world: int, cut: int) -> int:
    """Return how many copies of the model there are among so many processes, each of which `cut` of them share.

    Raises:
        ConfigError: they do not divide into such groups.
    """
    valid = f"a divisor of {world}, the number of processes"
    require(world % cut == 0, "trainer.strategy.tensor_parallel_size", cut, valid)
    return world // cut


def num_passes(world: int, cut: int, batch_size: int | None, micro_batch_size: int | None) -> int:
    """Return into how many forward passes one of the configuration's is split.

    Args:
        world: number of processes.
        cut: how many of them share one copy of the model.
        batch_size: data.batch_size; None: data of one's own, which know no such thing.
        micro_batch_size: see `accumulate`.

    Raises:
        ConfigError: the processes do not divide into groups that cut a model, the batch not into equal parts for them,
            or a part not into equal passes.
    """
    parts = num_models(world, cut)
    if batch_size is None:
        return 1
    valid = f"at most {batch_size} data-parallel processes (times trainer.num_nodes): data.batch_size={batch_size}"
    require(parts <= batch_size or batch_size < 1, "trainer.devices", parts, valid)
    valid = (
        f"a multiple of {parts}, the number of data-parallel processes (trainer.devices, trainer.num_nodes): "
        f"{_multiples_near(batch_size, parts)}"
    )
    require(batch_size % parts == 0, "data.batch_size", batch_size, valid)
    share = batch_size // parts
    if micro_batch_size is None:
        return 1
    fits = type(micro_batch_size) is int and micro_batch_size >= 1 and share % micro_batch_size == 0
    divisors = (
        f"one of {[n for n in range(1, share + 1) if share % n == 0]}" if share <= LISTED else f"a divisor of {share}"
    )
    valid = f"null, or {divisors}: {parts} data-parallel processes take {share} each of data.batch_size={batch_size}"
    require(fits, "micro_batch_size", micro_batch_size, valid)
    return share // micro_batch_size


def _multiples_near(size: int, parts: int) -> str:
    below = size // parts * parts
    return " or ".join(str(n) for n in (below, below + parts) if n)
