"""Says what becomes of the learning rate where a resumed run's schedule is not the one that it was trained with."""

import math

from torch.optim.lr_scheduler import LambdaLR

from lightning_modules.config import OptimConfig
from lightning_modules.optim import decay_length


def describe_change(
    config: OptimConfig, scheduler: LambdaLR, num_steps: float, before: float | None, by_steps: bool = True
) -> str | None:
    """Compare the schedule with the one of the checkpoint, from the next optimizer step on.

    Args:
        config: of this run.
        scheduler: with this run's schedule, and the state of the checkpoint; its optimizer has that one's rate.
        num_steps: optimizer steps that the schedule goes by.
        before: likewise, in the run that is resumed; None: its checkpoint does not say.
        by_steps: the run's length is given as `trainer.max_steps`; False: a Trainer of one's own has `max_epochs`.

    Returns:
        One line that says how the rate goes on and what would avoid it; None: it goes on as it would have.
    """
    step, peak, factor = scheduler.last_epoch, float(scheduler.base_lrs[0]), scheduler.lr_lambdas[0]
    held = float(scheduler.optimizer.param_groups[0]["lr"])
    jumps = not math.isclose(held, peak * factor(step), rel_tol=1e-6, abs_tol=1e-12)
    longer = before not in (None, num_steps) and config.schedule != "constant"
    if step == 0 or not (jumps or longer):
        return None
    if longer:
        length = "trainer.max_steps" if by_steps else "the number of steps that trainer.max_epochs makes"
        cause = f"optim.schedule={config.schedule} goes by {length}, {before:g} before and {num_steps:g} now"
    elif before is None:
        of = f" over {num_steps:g} steps" if math.isfinite(num_steps) and config.schedule != "constant" else ""
        cause = f"optim.schedule={config.schedule}{of} is not the checkpoint's schedule, which does not say its length"
    else:
        cause = f"optim.schedule={config.schedule} is not the checkpoint's schedule"
    following = peak * factor(step + 1)
    points = [f"{held:.3g} at step {step + 1}", f"{following:.3g} at step {step + 2}"]
    if math.isfinite(num_steps):
        points.append(f"{peak * factor(int(num_steps) - 1):.3g} at the end, step {num_steps:g}")
    advice = _advice(config, step, before, bool(following > held), by_steps)
    return f"Learning rate: {cause}; it is {', '.join(points)}; {advice}"


def _advice(config: OptimConfig, step: int, before: float | None, rises: bool, by_steps: bool) -> str:
    advice = []
    if before is None:
        advice.append("the same optim settings and the same number of steps as before keep the curve")
    elif before > step:
        length = f"trainer.max_steps={before:g}" if by_steps else f"a run of {before:g} steps"
        advice.append(f"{length} with the same optim settings keeps the curve")
    if rises and config.schedule == "wsd" and before is not None and math.isfinite(before):
        last = int(before) - decay_length(config, int(before))
        advice.append(f"a checkpoint of step {last} or before, where the decay begins, goes on without a rise")
    elif rises:
        advice.append(
            "to train longer without such a rise, begin with the final "
            f"trainer.max_{'steps' if by_steps else 'epochs'}, or with optim.schedule=wsd and resume from a "
            "checkpoint before its decay"
        )
    # Not capitalized: it may begin with the name of a field, which is to be copied as it stands.
    return ("; ".join(advice) or "the same optim settings as before keep the curve") + "."
