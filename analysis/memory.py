"""Counts what a training step holds, without holding it: shapes alone go through the model, as torch's fake tensors.

Counted as activations is what autograd keeps between forward and backward, each storage once: inputs of products and
norms, queries, keys, values and output of attention, and under autocast the cast weights. The peak of a step is that of
all that operators return, gradients among it, for as long as it is there. An operator's workspace is not counted, nor
is it known what a compiler would fuse away.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from core.compat import FakeTensorMode, TorchDispatchMode, tree_leaves


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Saved(NamedTuple):
    """Bytes for one forward pass.

    Attributes:
        blocks: inside each block.
        states: what goes into each block, and did not go into one before.
        outside: embedding, head and loss.
    """

    blocks: list[int]
    states: list[int]
    outside: int

    def total(self, recompute_every: int | None) -> int:
        """Return the bytes kept for the backward pass: at its beginning, or the most during it.

        Args:
            recompute_every: each n-th block keeps its input only, and is computed again; None: none is.
        """
        inside = 0
        recomputed = []
        for number, (block, state) in enumerate(zip(self.blocks, self.states, strict=True), start=1):
            if recompute_every and number % recompute_every == 0:
                inside += state
                recomputed.append(block)
            else:
                inside += block
        return self.outside + inside + max(recomputed, default=0)


def saved_activations(
    build: Any,
    batch_size: int,
    seq_len: int,
    chunked: bool,
    cut: int = 1,
    dtype: torch.dtype | None = None,
    weights: torch.dtype = torch.float32,
) -> Saved:
    """Return what a model's forward pass and its loss keep for the backward pass.

    Args:
        build: makes the model, which has `blocks` with `attn` and `ffn`; it must not recompute its blocks.
        batch_size: sequences that a device takes at once.
        chunked: whether the model takes the loss itself, of a part of the logits at a time.
        cut: processes that tensor parallelism cuts attention and dense FFN over.
        dtype: of autocast; None: there is none.
        weights: dtype of the weights, and so of all else where there is no autocast.
    """
    kept: dict[int, int] = defaultdict(int)  # block -> bytes
    states: list[int] = []
    handed_on: set[StorageWeakRef] = set()
    seen: set[StorageWeakRef] = set()
    place = {"block": 0, "share": 1}
    whole: set[StorageWeakRef] = set()  # the inputs of what is cut

    def keep(tensor: Tensor) -> Tensor:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage not in seen:
            seen.add(storage)
            kept[place["block"]] += tensor.untyped_storage().nbytes() // (1 if storage in whole else place["share"])
        return tensor

    def enter_block(number: int, inputs: tuple[Any, ...]) -> None:
        place["block"] = number
        streams = {
            StorageWeakRef(t.untyped_storage()): t.nbytes for t in tree_leaves(inputs[0]) if isinstance(t, Tensor)
        }
        states.append(sum(size for storage, size in streams.items() if storage not in handed_on))
        handed_on.update(streams)

    def enter_cut(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        place["share"] = cut
        whole.add(StorageWeakRef(inputs[0].untyped_storage()))

    def leave(name: str, value: int) -> Any:
        return lambda *_: place.update({name: value})

    with FakeTensorMode():
        with _default_dtype(weights):
            model = build()
        seen.update(StorageWeakRef(p.untyped_storage()) for p in (*model.parameters(), *model.buffers()))
        for number, block in enumerate(model.blocks, start=1):
            block.register_forward_pre_hook(lambda _, inputs, number=number: enter_block(number, inputs))
            block.register_forward_hook(leave("block", 0))
            dense = getattr(block.ffn, "shared_expert", block.ffn)
            for module in (block.attn, dense):
                if module is not None:
                    module.register_forward_pre_hook(enter_cut)
                    module.register_forward_hook(leave("share", 1))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _loss(model, batch_size, seq_len, chunked, dtype)
    return Saved([kept[number + 1] for number in range(len(model.blocks))], states, kept[0])


def peak_of_step(
    build: Any,
    batch_size: int,
    seq_len: int,
    chunked: bool,
    dtype: torch.dtype | None = None,
    weights: torch.dtype = torch.float32,
    kept_of_gradients: float = 1.0,
    accumulated: bool = False,
) -> int:
    """Return the most bytes that a training step takes at once beside weights and the optimizer's state.

    Not all gradients of the parameters are there while all activations are, as each block's take the place of its
    activations; those of what blocks hand on (of all sources of attention residuals) come on top.

    Args:
        build: makes the model; it may recompute its blocks.
        batch_size, seq_len, chunked, dtype, weights: as of saved_activations.
        kept_of_gradients: the share of the parameters' gradients that stays in this process.
        accumulated: whether they are there from the beginning, and are added to.
    """
    with FakeTensorMode():
        with _default_dtype(weights):
            model = build()
        live = _Live([*model.parameters(), *model.buffers()])
        made = 0.0

        def keep_share(parameter: Tensor) -> None:
            nonlocal made
            made += parameter.nbytes * kept_of_gradients
            live.forget(parameter.grad)
            parameter.grad = None
            live.beside = 0 if accumulated else int(made)

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(keep_share)
        with live:
            _loss(model, batch_size, seq_len, chunked, dtype).backward()
        return live.most + (int(made) if accumulated else 0)


def _loss(model: Any, batch_size: int, seq_len: int, chunked: bool, dtype: torch.dtype | None) -> Tensor:
    """Return the loss of inputs that are nothing but a shape, under autocast to a dtype, if one is given."""
    batch = model.example(batch_size, seq_len)
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        loss: Tensor = model.loss(batch, chunked)
        return loss


class _Live(TorchDispatchMode):
    """Counts the bytes of what operators return, each storage once, from its making to its end.

    Args:
        known: what is not counted.

    Attributes:
        most: the most bytes at once so far, with `beside`.
        beside: what is there beside them.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.most = self.beside = self._bytes = 0
        self._counted: dict[int, tuple[weakref.ref[Any], int]] = {}
        for tensor in known:
            self._count(tensor.untyped_storage(), 0)

    def forget(self, tensor: Tensor | None) -> None:
        """Count a tensor's storage no more."""
        assert tensor is not None
        storage = tensor.untyped_storage()
        reference, size = self._counted[id(storage)]
        self._bytes -= size
        self._counted[id(storage)] = (reference, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._count(storage, storage.nbytes())
        self.most = max(self.most, self._bytes + self.beside)
        return out

    def _count(self, storage: Any, size: int) -> None:
        key = id(storage)
        if key not in self._counted:
            self._counted[key] = (weakref.ref(storage, lambda _: self._end(key)), size)
            self._bytes += size

    def _end(self, key: int) -> None:
        _, size = self._counted.pop(key)
        self._bytes -= size
