"""Keeps an exponential moving average of the weights that short runs can use, too."""

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from core.errors import require


class AveragedWeights(WeightAveraging):
    """Validates, saves and exports an exponential moving average of the weights, beside those that train.

    An update that follows n others keeps min(decay, (1 + n) / (10 + n)) of the average, as TensorFlow's
    ExponentialMovingAverage does with `num_updates`. With the whole decay from the start the average of a run shorter
    than 1 / (1 - decay) steps would be mostly what the run began with. What is not a floating-point number is taken as
    the model has it.

    Args:
        decay: of the average, in [0, 1): 0.999 remembers the last thousand updates.
        update_every_n_steps: optimizer steps from one update to the next.

    Raises:
        ConfigError: an argument is outside its range.
    """

    def __init__(self, decay: float = 0.999, update_every_n_steps: int = 1) -> None:
        require(0 <= decay < 1, "callbacks.ema.decay", decay, "in [0, 1)")
        whole = type(update_every_n_steps) is int and update_every_n_steps >= 1
        require(whole, "callbacks.ema.update_every_n_steps", update_every_n_steps, "an integer of at least 1")
        self.decay, self.update_every_n_steps = decay, update_every_n_steps
        super().__init__(avg_fn=self._average)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx % self.update_every_n_steps == 0

    def _average(self, average: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        """Return the next average of one tensor, after so many updates; torch itself takes the first one as it is."""
        if not average.is_floating_point():
            return current
        n = torch.as_tensor(updates, dtype=torch.float32, device=average.device)
        # The share of what is new is computed in fp32: in bf16 the share of what is kept would be rounded to 1.
        return average + (current - average) * (1 - ((1 + n) / (10 + n)).clamp(max=self.decay))
