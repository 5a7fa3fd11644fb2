"""Lightning's strategies for several processes, as the configuration has them.

FSDP2, tensor and expert parallelism are its ModelParallelStrategy, with checkpoints written beside the training.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from core.atomic_write import save, unfinished_of
from core.checkpoint import load, load_beside_weights, put_in_place, remove
from core.compat import key_optimizer_state_by_name, load_full_weights
from core.distributed_checkpoint import PiecesWriter, fill
from core.errors import ConfigError, one_line, require
from core.rank_errors import failing_together
from core.sharded_checkpoint import META, VALUES, joined, name_of, read_index, split
from core.untrusted import Untrusted


class DataParallelStrategy(DDPStrategy):
    """The whole model in each process: trainer=ddp.

    Args:
        timeout_minutes: after which a process that waits for another in vain gives up.
        process_group_backend: None: nccl on CUDA devices, gloo elsewhere.
    """

    def __init__(self, timeout_minutes: float = 10.0, process_group_backend: str | None = None) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=_timeout(timeout_minutes))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        with failing_together():  # the first process alone writes
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        # The first process alone has looked at every byte. Lightning's ModelParallelStrategy does this itself.
        return super().load_checkpoint(self.broadcast(checkpoint_path), weights_only)


class ShardedStrategy(ModelParallelStrategy):
    """One model over all processes: trainer=fsdp.

    A checkpoint is a folder of core/sharded_checkpoint.py, which any number of processes loads. Saving copies the
    weights to the host, and goes on writing while the next steps run. The folder has its name once it is whole, so a
    kill leaves the one before.

    Args:
        tensor_parallel_size: processes that cut one attention or FFN between them; the others share the data.
        asynchronous: false: training waits for what is saved.
        timeout_minutes: after which a process that waits for another in vain gives up.
        process_group_backend: None: nccl on CUDA devices, gloo elsewhere.
        param_dtype: what the blocks' weights are sent in when they are gathered, float32 or bfloat16, which needs
            bf16-mixed: half as much is sent, and gains, routers and coefficients are rounded too. Gradients are added
            up in fp32 either way; embedding and head, from which the stream comes and to which it goes, are sent in it.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        asynchronous: bool = True,
        timeout_minutes: float = 10.0,
        process_group_backend: str | None = None,
        param_dtype: str = "float32",
    ) -> None:
        valid = "an integer >= 1"
        require(tensor_parallel_size >= 1, "trainer.strategy.tensor_parallel_size", tensor_parallel_size, valid)
        names = ("float32", "bfloat16")
        require(param_dtype in names, "trainer.strategy.param_dtype", param_dtype, " or ".join(names))
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            process_group_backend=process_group_backend,
            timeout=_timeout(timeout_minutes),
        )
        self.tensor_parallel_size, self.asynchronous = tensor_parallel_size, asynchronous
        self.param_dtype = param_dtype
        self._saving: Future[Any] | None = None
        self._saving_group: dist.ProcessGroup | None = None

    @property
    def mixed_precision(self) -> MixedPrecisionPolicy:
        """FSDP2's policy for the blocks; what goes into them keeps its type, as autocast sees to the products."""
        if self.param_dtype == "float32":
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def check_precision(self, precision: str) -> None:
        """Refuse weights in bfloat16 where products are not.

        Args:
            precision: the Trainer's.

        Raises:
            ConfigError: it is not bf16-mixed.
        """
        fits = self.param_dtype == "float32" or precision == "bf16-mixed"
        valid = f"float32, as trainer.precision={precision} is not bf16-mixed"
        require(fits, "trainer.strategy.param_dtype", self.param_dtype, valid)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes // self.tensor_parallel_size
        super().setup_environment()
        # A group of its own: the thread that saves must not come between the collectives of the training.
        self._saving_group = dist.new_group(backend="gloo", timeout=self._timeout)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        path = Path(self.broadcast(filepath))
        self.finish_saving()
        unfinished = unfinished_of(path)
        state = {"state_dict": checkpoint.pop("state_dict")}
        for number, optimizer in enumerate(checkpoint.pop("optimizer_states", [])):
            state[f"optimizer_{number}"] = optimizer
        values, tensors = split(state)
        writer = PiecesWriter(unfinished, {name_of(path): path for path in tensors})
        named: dict[str, Any] = {name_of(path): tensor for path, tensor in tensors.items()}
        with failing_together():
            if self.is_global_zero:
                remove(unfinished)
                unfinished.mkdir(parents=True)
                save(checkpoint, unfinished / META)
                save(values, unfinished / VALUES)
        if not self.asynchronous:
            with failing_together(), _in_words():
                dcp.save(named, storage_writer=writer, process_group=self._saving_group)
                self._put_in_place(unfinished, path)
            return
        saving = dcp.async_save(named, storage_writer=writer, process_group=self._saving_group)
        assert isinstance(saving, Future)
        # Another future: the first one is done before those who wait for it to be done have acted.
        in_place: Future[None] = Future()
        self._saving = in_place

        def put_in_place(saved: Future[Any]) -> None:
            try:
                saved.result()
                self._put_in_place(unfinished, path)
            except BaseException as error:  # raised again by finish_saving
                in_place.set_exception(error)
            else:
                in_place.set_result(None)

        saving.add_done_callback(put_in_place)

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being saved, if one is; what went wrong in any process is raised in all.

        All come here at the same point of the training.

        Raises:
            OSError: a process cannot write.
            RuntimeError: another reason, in the words of the processes where it failed.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            with failing_together(), _in_words():
                saving.result()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        self.finish_saving()
        path = Path(self.broadcast(checkpoint_path))  # the first process alone has looked at every byte
        return self._load_pieces(path) if path.is_dir() else self._load_file(path)

    def on_train_end(self) -> None:
        self.finish_saving()
        super().on_train_end()

    def teardown(self) -> None:
        """End the saving in progress; an error that has brought it here goes before one of the saving."""
        first, saving, self._saving = sys.exception(), self._saving, None
        try:
            if saving is not None:  # alone: the others may be elsewhere
                with _in_words():
                    saving.result()
        except Exception as error:
            if first is None:
                raise
            print(f"The checkpoint that was being written is lost: {one_line(error)}", file=sys.stderr, flush=True)
        finally:
            super().teardown()

    def _put_in_place(self, unfinished: Path, path: Path) -> None:
        if self.is_global_zero:
            put_in_place(unfinished, path)

    def _load_pieces(self, path: Path) -> dict[str, Any]:
        try:
            return self._restore(path)
        except Untrusted as error:
            valid = f"a checkpoint of this run ({one_line(error)})"
            raise ConfigError("ckpt_path", str(path), valid) from error

    # As Lightning's ModelParallelStrategy has it, whose own way goes through pickles.
    def _restore(self, path: Path) -> dict[str, Any]:
        assert self.model is not None
        pieces = read_index(path)
        saved = pieces.plain_values()
        weights: dict[str, Any] = get_model_state_dict(self.model)
        fill({("state_dict", name): tensor for name, tensor in weights.items()}, pieces)
        self.model.load_state_dict(weights)
        for number, optimizer in enumerate(self.optimizers):
            name = f"optimizer_{number}"
            own: dict[str, Any] = {name: get_optimizer_state_dict(self.model, optimizer)}
            _, tensors = split(own)
            fill(tensors, pieces)
            if name not in saved:
                raise Untrusted(f"it has no {name}")
            theirs, ours = (sorted(sorted(g["params"]) for g in s[name]["param_groups"]) for s in (saved, own))
            if theirs != ours:
                raise Untrusted(f"its {name} has other groups of parameters")
            state = joined({name: saved[name]}, tensors)[name]
            options = StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state, options=options)
        return load_beside_weights(path)

    def _load_file(self, path: Path) -> dict[str, Any]:
        assert self.model is not None
        checkpoint = load(path)
        load_full_weights(checkpoint.pop("state_dict"), self.model)
        options = StateDictOptions(broadcast_from_rank0=True, full_state_dict=True)
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            state = key_optimizer_state_by_name(saved, self.model)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state, options=options)
        return checkpoint


@contextmanager
def _in_words() -> Iterator[None]:
    """Turn torch's own error, which is no Exception, into one that says what failed, and where."""
    try:
        yield
    except CheckpointException as error:
        failures = {rank: failure for rank, (failure, _) in error.failures.items()}
        for failure in failures.values():
            if isinstance(failure, OSError) and failure.errno is not None:
                raise OSError(failure.errno, failure.strerror) from error
        reasons = "; ".join(f"process {rank}: {one_line(failure)}" for rank, failure in failures.items())
        raise RuntimeError(f"the checkpoint was not saved ({reasons})") from error


def _timeout(minutes: float) -> timedelta:
    require(minutes > 0, "trainer.strategy.timeout_minutes", minutes, "a number > 0")
    return timedelta(minutes=minutes)
