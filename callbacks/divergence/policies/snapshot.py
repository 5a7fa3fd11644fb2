"""A snapshot is what a run can be taken back to, kept in memory; snapshot_file.py keeps it over a stop."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class Snapshot:
    """Holds this process' weights, their averages, optimizer state and random state on the host; of sharded tensors
    its own part.

    With AdamW that takes three times the memory of the weights, and once more for each average of them.

    Args:
        step: optimizer steps done.
        detectors: their state after that step.
        averages: of the weights, after that step.

    Attributes:
        restored_at: the step before which the run was last taken back to here; None: never.
    """

    def __init__(
        self,
        step: int,
        module: L.LightningModule,
        optimizer: Optimizer,
        detectors: dict[str, Any],
        averages: Mapping[str, Tensor],
    ) -> None:
        self.step, self.detectors = step, detectors
        self.restored_at: int | None = None
        self._weights = {name: _copy(tensor) for name, tensor in module.state_dict().items()}
        self._averages = {name: _copy(tensor) for name, tensor in averages.items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        self._optimizer = {
            names[p]: {key: _copy(x) for key, x in state.items()} for p, state in optimizer.state.items()
        }
        self._random = torch.get_rng_state()
        self._cuda_random = torch.cuda.get_rng_state() if module.device.type == "cuda" else None

    @torch.no_grad()
    def restore(self, module: L.LightningModule, optimizer: Optimizer, averages: Mapping[str, Tensor]) -> None:
        """Put the state back in place, but for the optimizer's groups: learning rates go by a clock that goes on."""
        for name, tensor in module.state_dict().items():
            local(tensor).copy_(self._weights[name])
        for name, tensor in averages.items():
            local(tensor).copy_(self._averages[name])
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
    def from_state_dict(cls, state: Any, like: "Snapshot") -> "Snapshot":
        """Return the snapshot that `state_dict` described, in another process.

        Args:
            like: one of the run as it is now; what is restored must be of its shapes.

        Raises:
            ValueError: it is not the state of one, or not of this run; says which part.
        """
        state = {"_averages": {}, **state} if isinstance(state, dict) else state  # older ones have none
        if not isinstance(state, dict) or state.keys() != vars(like).keys():
            raise ValueError("it is no snapshot")
        for name in ("step", "restored_at"):
            if type(state[name]) is not int and not (state[name] is None and name == "restored_at"):
                raise ValueError(f"its {name} is no step")
        if not 0 <= state["step"] <= like.step:
            raise ValueError(f"its step is none of 0 to {like.step}")
        for name in ("_weights", "_averages", "_optimizer", "detectors"):
            _check_like(state[name], getattr(like, name), name.strip("_"))
        for name in ("_random", "_cuda_random"):
            _check_random(state[name], getattr(like, name), name.strip("_"))
        snapshot = cls.__new__(cls)
        vars(snapshot).update(state)
        return snapshot


def _check_like(value: Any, like: Any, name: str) -> None:
    """Raise ValueError unless a value has the nested names, shapes and types of another one.

    A parameter that had not stepped yet is missing in the optimizer's state.
    """
    if isinstance(like, dict):
        missing = like.keys() - value.keys() if isinstance(value, dict) else like.keys()
        if not isinstance(value, dict) or value.keys() - like.keys() or (missing and name != "optimizer"):
            raise ValueError(f"its {name} has other parts than this run's")
        for key, part in value.items():
            _check_like(part, like[key], f"{name}.{key}")
    elif isinstance(like, Tensor):
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (like.shape, like.dtype):
            raise ValueError(f"its {name} is not of this run's shape and type")
    elif isinstance(like, list):
        if not isinstance(value, list) or not all(isinstance(each, int | float) for each in value):
            raise ValueError(f"its {name} is no list of numbers")
    elif not isinstance(value, int | float | None):
        raise ValueError(f"its {name} is no number")


def _check_random(value: Any, like: Tensor | None, name: str) -> None:
    """Raise ValueError unless a value is a state of the random numbers; of a device that is not used here it may be."""
    if like is None and value is None:
        return
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.ndim != 1:
        raise ValueError(f"its {name} is no state of random numbers")
    if like is None:
        return
    try:
        torch.Generator("cuda" if name == "cuda_random" else "cpu").set_state(value)
    except RuntimeError as error:
        raise ValueError(f"its {name} is no state of random numbers") from error


def _copy(value: Any) -> Any:
    return local(value).detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
