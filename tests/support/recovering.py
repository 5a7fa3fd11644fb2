"""A run that diverges and recovers."""

import json
from pathlib import Path

ROLLBACK = "callbacks.divergence.policy=rollback"
OPTIONS = "callbacks.divergence.policy_options={every: 10, margin: 5, patience: 2, cooldown: 12}"


def done(folder: Path) -> dict[int, str]:
    """{step: what was done about its alarms}."""
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return {event["step"]: event["done"] for event in found}


def nan_gradient(first: int, num_steps: int) -> str:
    """The override that makes the gradients of some steps NaN."""
    return f"+callbacks.nan={{_target_: tests.support.sabotage.NaNGradient, first: {first}, num_steps: {num_steps}}}"


TAKING_BACK = [
    "experiment=dense_spannorm",
    "model.num_layers=1",
    "trainer.max_steps=40",
    "trainer.val_check_interval=20",
    ROLLBACK,
    OPTIONS,
]
RECOVERING = [*TAKING_BACK, nan_gradient(18, 2)]
