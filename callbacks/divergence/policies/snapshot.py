"""What a run can be taken back to, kept in memory; snapshot_file.py keeps it over a stop."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class Snapshot:
    """Holds this process' weights, optimizer state and random state on the host; of sharded tensors its own part.

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
        names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        self._optimizer = {
            names[p]: {key: _copy(x) for key, x in state.items()} for p, state in optimizer.state.items()
        }
        self._random = torch.get_rng_state()
        self._cuda_random = torch.cuda.get_rng_state() if module.device.type == "cuda" else None

    @torch.no_grad()
    def restore(self, module: L.LightningModule, optimizer: Optimizer) -> None:
        """Put the state back in place, but for the optimizer's groups: learning rates go by a clock that goes on."""
        for name, tensor in module.state_dict().items():
            local(tensor).copy_(self._weights[name])
        names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        for parameter in list(optimizer.state):
            if names[parameter] not in self._optimizer:  # it had not stepped yet
                del optimizer.state[parameter]
                continue
            state = optimizer.state[parameter]
            for key, value in self._optimizer[names[parameter]].items():
                if isinstance(value, Tensor):
                    local(state[key]).copy_(value)
                else:
                    state[key] = value
        torch.set_rng_state(self._random)
        if self._cuda_random is not None and module.device.type == "cuda":  # it may have been resumed elsewhere
            torch.cuda.set_rng_state(self._cuda_random)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors; the tensors are not copied."""
        return dict(vars(self))

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Snapshot":
        """Return the snapshot that `state_dict` described, in another process.

        Raises:
            ValueError: it is not the state of one.
        """
        if state.keys() != _KINDS.keys() or not all(isinstance(state[name], kind) for name, kind in _KINDS.items()):
            raise ValueError("this is no snapshot's state")
        snapshot = cls.__new__(cls)
        vars(snapshot).update(state)
        return snapshot


_KINDS: dict[str, Any] = {
    **{"step": int, "detectors": dict, "restored_at": int | None},
    **{"_weights": dict, "_optimizer": dict, "_random": Tensor, "_cuda_random": Tensor | None},
}


def _copy(value: Any) -> Any:
    return local(value).detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
