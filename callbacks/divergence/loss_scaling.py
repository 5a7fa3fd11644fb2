"""float16 trains on a scaled loss, which whoever judges steps has to do without."""

import lightning as L

from core.errors import require


def refuse_loss_scaling(trainer: L.Trainer) -> None:
    """Refuse float16's scaled loss, in `setup` of a callback that judges losses or steps that are not finite.

    Under a scaler the loss before the backward pass is tens of thousands of times its value, a gradient that is not
    finite is how the scale is found, and the optimizer is not called on such a step: what was arranged for it would
    hold for a later one.

    Raises:
        ConfigError: the precision scales the loss.
    """
    valid = "one that does not scale the loss (bf16-mixed, 32-true), or callbacks.divergence=null with "
    valid += "callbacks.flight_recorder=null"
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    require(scaler is None, "trainer.precision", trainer.precision, valid)
