"""The loss of an optimizer step, read without waiting for the device once more."""

import torch
from torch import Tensor


class StepLoss:
    """Mean over this process' batches of the step.

    It is on its way to the host before the gradients are there. Whoever reads gradient norms waits for the device
    anyway, and after that `value` holds.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._host: Tensor | None = None

    def add(self, loss: Tensor, last: bool) -> None:
        """A batch's loss.

        Args:
            loss: as `on_before_backward` gets it, divided by the number of batches of a step.
            last: it is the step's last.
        """
        loss = loss.detach()
        self._sum = loss if self._sum is None else self._sum + loss
        if not last:
            return
        if self._host is None:
            self._host = torch.empty((), pin_memory=loss.device.type == "cuda")
        self._host.copy_(self._sum, non_blocking=True)
        self._sum = None

    @property
    def value(self) -> float:
        """Of the step whose last batch was added last."""
        assert self._host is not None
        return float(self._host)
