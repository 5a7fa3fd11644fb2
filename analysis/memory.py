"""Counts what a training step holds, without holding it: shapes alone go through the model, as torch's fake tensors.

Counted is what autograd keeps between forward and backward, each storage once: inputs of products and norms, queries,
keys, values and output of attention, and under autocast the cast weights. What lives shorter (an operator's workspace)
is not, nor is it known what a compiler would fuse away.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from core.compat import FakeTensorMode, tree_leaves


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
        tokens = torch.zeros(batch_size, seq_len + 1, dtype=torch.long)
        autocast = nullcontext() if dtype is None else torch.autocast("cpu", dtype)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            if chunked:
                model(tokens[:, :-1], targets=tokens[:, 1:])
            else:
                logits, _ = model(tokens[:, :-1])
                F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    return Saved([kept[number + 1] for number in range(len(model.blocks))], states, kept[0])
