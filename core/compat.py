"""Every use of what Lightning and torch do not document, by a function or name with its reason.

A newer version may change any of it. tests/core/test_compat.py says of each whether it still holds, and that no other
module reaches for such things; `make check-newest` runs it with the newest versions. Overridden where they are
subclassed, and so not here: `nn.Module._apply`, which every cast and move of a module goes through (routers and metrics
keep fp32 by it), and `ParallelStyle._apply` of tensor parallelism.

Lightning is imported where it is used, so that what is needed without it does not wait for it.
"""

import multiprocessing.synchronize
import re
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import all_reduce, all_to_all_single_autograd, wait_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.loggers import WandbLogger

__all__ = [
    "FakeTensorMode",
    "TorchDispatchMode",
    "all_reduce",
    "all_to_all_single_autograd",
    "tree_leaves",
    "wait_tensor",
]
"""FakeTensorMode, TorchDispatchMode and tree_leaves: shapes of a model that has no memory, for tools.plan. The
collectives: those that torch.compile traces, and that have gradients; torch.distributed's own have neither."""

RESTORING = ("restore_callbacks", "restore_loops", "restore_optimizers_and_schedulers", "restore_datamodule")
"""Lightning's functions that hand out what a checkpoint holds; their names stand in the traceback of what fails there.
It gives such errors no type of their own."""


# Lightning: the loop's counters and the connector of signals, for which it has no public way.


def take_early_sigterm(trainer: "L.Trainer") -> bool:
    """Return whether Lightning has noted a SIGTERM before our handlers were in place, and let it forget it.

    It would leave amid the run's first step, and nothing would be saved.
    """
    connector: Any = trainer._signal_connector
    received = bool(connector.received_sigterm)
    if received:
        connector.received_sigterm = False
    return received


def forget_batch_that_never_began(trainer: "L.Trainer") -> None:
    """Correct the counters of a checkpoint that was saved between two batches.

    It says that the next batch was ready, although it had not begun, and Lightning validates by batches that are ready.
    """
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    batches.ready = min(batches.ready, batches.started)


def set_logged_step(trainer: "L.Trainer") -> None:
    """Let loggers write the optimizer step that is next.

    Lightning restores their number one too small or too large where the checkpoint was saved around a validation, and
    the curve of a resumed run would be shifted.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def leave_out_deprecated_settings(logger: "WandbLogger") -> None:
    """Let a WandbLogger not pass on what wandb warns of, though nobody has set it: Lightning always passes it."""
    if logger._wandb_init["anonymous"] is None:
        del logger._wandb_init["anonymous"]


def is_resuming(trainer: "L.Trainer") -> bool:
    """Return whether the loops go on from a checkpoint and have not done a batch yet."""
    return bool(trainer.fit_loop.restarting)


def is_resuming_within_epoch(trainer: "L.Trainer") -> bool:
    """Return whether the loops go on from within an epoch, where Lightning leaves out `on_train_epoch_start`."""
    loop = trainer.fit_loop
    return bool(loop.restarted_mid_epoch or loop.restarted_on_epoch_end)


def set_processed_batches(trainer: "L.Trainer", batches: int) -> None:
    """Let the loops count on from so many processed batches, as they do after a checkpoint of so many."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    shift = batches - progress.total.processed
    for counts in (progress.total, progress.current):
        for name in ("ready", "started", "processed", "completed"):
            setattr(counts, name, getattr(counts, name) + shift)


def ask_for_no_epoch(trainer: "L.Trainer") -> None:
    """Let a run of steps end in its first epoch: beside `min_steps`, Lightning makes `min_epochs` 1 by itself."""
    trainer.fit_loop.min_epochs = 0


def is_restoring(error: BaseException) -> bool:
    """Return whether an error came out of what hands a checkpoint's states to callbacks, loops and optimizers."""
    return any(frame.name in RESTORING for frame in traceback.extract_tb(error.__traceback__))


def lacks_metric(error: BaseException) -> bool:
    """Return whether an EarlyStopping found no metric of its name: Lightning raises no error of a type of its own."""
    return isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric")


def lacks_compiler(error: BaseException) -> bool:
    """Return whether torch.compile found no compiler, or not Python's headers, by what it and Triton say of that.

    Triton compiles its launcher by a command, and of a header that is not there says only that the command failed.
    """
    said = r"No working C\+\+ compiler found|Failed to find C compiler|Python\.h: No such file"
    return re.search(rf"{said}|CalledProcessError: Command '\['\S*(cc|clang)'", str(error)) is not None


def total_batch(trainer: "L.Trainer") -> int:
    """Return the number of the training batch in progress, counted from 0 over all epochs."""
    return int(trainer.fit_loop.total_batch_idx)


def batch_in_epoch(trainer: "L.Trainer") -> int:
    """Return the number of the training batch in progress, counted from 0 in its epoch.

    Hooks that are called with the backward pass do not get it.
    """
    return int(trainer.fit_loop.batch_idx)


def prunes_when_an_epoch_ends(callback: "L.Callback") -> bool:
    """Return whether a ModelPruning prunes at the end of a training epoch; it keeps what it was told to itself."""
    return bool(getattr(callback, "_prune_on_train_epoch_end", False))


def averaged_weights(trainer: "L.Trainer") -> dict[str, Tensor]:
    """Return what callbacks that average weights keep, themselves and not copies; a callback of ours is one of them."""
    from lightning.pytorch.callbacks import WeightAveraging

    found: list[Any] = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]  # type: ignore[attr-defined]
    models = (callback._average_model for callback in found)
    return {
        f"{number}.{name}": tensor
        for number, model in enumerate(models)
        if model is not None
        for name, tensor in model.state_dict().items()
    }


def saves_in_pieces(trainer: "L.Trainer") -> bool:
    """Return whether the strategy has each process save its part, as ModelParallelStrategy does by default."""
    return bool(getattr(trainer.strategy, "_save_distributed_checkpoint", False))


def load_full_weights(state_dict: dict[str, Any], model: nn.Module) -> None:
    """Load the whole weights, which the first process has read, into a model that is sharded over all."""
    from lightning.fabric.strategies.model_parallel import _load_raw_module_state

    _load_raw_module_state(state_dict, model)


def key_optimizer_state_by_name(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the state of an optimizer with the parameters' names for their numbers; with names, it stays."""
    from lightning.fabric.strategies.model_parallel import _rekey_optimizer_state_if_needed

    return _rekey_optimizer_state_if_needed(dict(state_dict), model)


if TYPE_CHECKING:
    restricted_classmethod = classmethod
else:

    def restricted_classmethod(method: Any) -> Any:
        """Return a class method that raises TypeError where it is called on an instance, as Lightning's loaders do."""
        from lightning.pytorch.utilities.model_helpers import _restricted_classmethod_impl

        return _restricted_classmethod_impl(method)


# torch: operators and switches.


def foreach_norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the l2 norm of each tensor, [tensors], summed in `dtype`; on a GPU by a few kernels for all of them."""
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype))


def foreach_differences(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Return each tensor of `left` less its counterpart in `right`; on a GPU by a few kernels for all of them."""
    return list(torch._foreach_sub(list(left), list(right)))


def foreach_scale_(tensors: Sequence[Tensor], factors: float | Sequence[Tensor]) -> None:
    """Multiply each tensor by its factor, or all by one, in place; on a GPU by a few kernels for all of them."""
    torch._foreach_mul_(list(tensors), factors if isinstance(factors, float) else list(factors))


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [..., in] W^T of weight [out, in], by oneDNN: [..., out], fp32, on a CPU, without a gradient.

    torch itself takes MKL, and as a 1x1 convolution, the public way to oneDNN, a step is slower than by MKL.
    """
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def allow_graphs(count: int) -> None:
    """Let torch.compile make at least so many graphs of one function; past its limit of 8 it runs uncompiled."""
    torch._dynamo.config.recompile_limit = max(count, torch._dynamo.config.recompile_limit)


def unscale_before_clipping(optimizer: torch.optim.Optimizer) -> None:
    """Have fp16's loss scaling undone before gradients are clipped, and not in the step of a fused optimizer.

    Lightning refuses to clip where a fused AdamW says that it does so by itself, in any mixed precision.
    """
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


# torch: errors that have no type of their own, by their words.


def lost_a_peer(error: BaseException) -> bool:
    """Return whether another process is gone, or did not answer: gloo has no exception, but names its source file."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def stop_watching_launched() -> None:
    """Let the processes that Lightning has launched end as they will.

    Its thread looks after them every five seconds, and when one has failed it kills all, this process too.
    """
    from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes.clear()


def lacks_shared_memory(error: BaseException) -> bool:
    """Return whether data-loader processes got no shared memory: for a batch, or even for a loader's first lock."""
    if not isinstance(error, OSError | RuntimeError):
        return False
    places = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    no_lock = isinstance(error, OSError) and places[-1:] == [multiprocessing.synchronize.__file__]
    return no_lock or "shared memory(shm)" in str(error)


def lost_a_loader_process(error: BaseException) -> bool:
    """Return whether a data-loader process has been killed."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def lacks_memory(error: BaseException) -> bool:
    """Return whether the machine or the device had not the memory that was asked for, or the number overflowed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("can't allocate memory", "Storage size calc", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)
