"""What a run can be taken back to, kept in memory."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class Snapshot:
    """Weights, optimizer state and random state of this process, copied to the host; of sharded tensors its own part.

    With AdamW that takes three times the memory of the weights.

    Args:
        step: optimizer steps done.
        detectors: their state after that step.

    Attributes:
        restored_at: the step before which the run was last taken back to here; None: never.
    """

    def __init__(self, step: int, module: L.LightningModule, optimizer: Optimizer, detectors: dict[str, Any]) -> None:
        self.step, self.detectors = step, detectors
        self.restored_at: int | None = None
        self._weights = {name: _copy(tensor) for name, tensor in module.state_dict().items()}
        self._optimizer = {p: {key: _copy(x) for key, x in state.items()} for p, state in optimizer.state.items()}
        self._random = torch.get_rng_state()
        self._cuda_random = torch.cuda.get_rng_state() if module.device.type == "cuda" else None

    @torch.no_grad()
    def restore(self, module: L.LightningModule, optimizer: Optimizer) -> None:
        """In place. The optimizer's groups stay as they are: learning rates go by the clock, which is not put back."""
        for name, tensor in module.state_dict().items():
            local(tensor).copy_(self._weights[name])
        for parameter in list(optimizer.state):
            if parameter not in self._optimizer:  # it had not stepped yet
                del optimizer.state[parameter]
                continue
            state = optimizer.state[parameter]
            for key, value in self._optimizer[parameter].items():
                if isinstance(value, Tensor):
                    local(state[key]).copy_(value)
                else:
                    state[key] = value
        torch.set_rng_state(self._random)
        if self._cuda_random is not None:
            torch.cuda.set_rng_state(self._cuda_random)


def _copy(value: Any) -> Any:
    return local(value).detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
