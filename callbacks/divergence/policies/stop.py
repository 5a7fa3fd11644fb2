"""End the run before the weights are spoilt."""

from callbacks.divergence.policies.base import GiveUp, Policy, Step


class Stop(Policy):
    """Ends the run at the first alarm, with a report and an exit code of its own."""

    def act(self, step: Step) -> str | None:
        if step.alarms:
            raise GiveUp("an alarm under policy=stop")
        return None
