"""Keeps, while a run trains, what the instruments for trained models say of it: how depth comes into use."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from torch.distributed.tensor import DTensor

from analysis.anatomy.findings import Findings
from analysis.anatomy.held_out import HeldOut, has_blocks, held_out
from analysis.anatomy.registry import MEASURES
from analysis.evaluating import evaluating
from callbacks.scalars import write_scalars
from core.atomic_write import write_whole
from core.errors import InvalidValue, lookup, require

FOLDER = "anatomy/steps"
"""Below the run's."""


class Anatomy(L.Callback):
    """Measures the model on held-out data before the first step, after every n-th and after the last one.

    Writes RUN/anatomy/steps/STEP.json, from which `python -m tools.anatomy` draws depth over steps, and logs:

    | key | unit |
    |---|---|
    | anatomy/SCALAR | the measures' scalars: docs/anatomy.md |
    | anatomy/block_BLOCK/CURVE | their curves over blocks |

    Training stays as it is: nothing is drawn at random, and no gradient is taken. One process measures, with its own
    copy of the weights.

    Args:
        run_dir: the run's folder.
        every_n_steps: optimizer steps between two measurements.
        measures: names in analysis.anatomy.registry.MEASURES, of which none may be slow.
        tokens: so many, the first of validation; of images patches and class tokens.

    Raises:
        ConfigError: one of them is too small, no such measure, parameters are sharded, the model has no blocks, or the
            Trainer has no DataModule.
    """

    def __init__(
        self,
        run_dir: str,
        every_n_steps: int = 1000,
        measures: Sequence[str] = ("layer_drop", "contribution", "similarity", "lens"),
        tokens: int = 4096,
    ) -> None:
        for field, value in (("every_n_steps", every_n_steps), ("tokens", tokens)):
            require(value >= 1, f"callbacks.anatomy.{field}", value, "an integer >= 1")
        self.measures = [lookup("callbacks.anatomy.measures", name, MEASURES)() for name in measures]
        for measure in self.measures:
            valid = "one that is not slow: it would hold up training, and can be measured afterwards"
            require(not measure.slow, "callbacks.anatomy.measures", measure.name, valid)
        self.folder, self.every_n_steps, self.tokens = Path(run_dir) / FOLDER, every_n_steps, tokens
        self._data: HeldOut | None = None
        self._measured: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model: Any = pl_module.model
        name = type(self).__name__
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise InvalidValue("callbacks.anatomy", name, "it needs every parameter whole in each process")
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not has_blocks(model):
            raise InvalidValue("callbacks.anatomy", name, "it looks at blocks, as lightning_modules.trunk has them")
        if datamodule is None:
            reason = "it takes held-out data from a DataModule, and there is none"
            raise InvalidValue("callbacks.anatomy", name, reason)
        if trainer.is_global_zero:
            self._data = held_out(datamodule, pl_module, self.tokens)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure(trainer, pl_module)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the weights after this number of steps, once."""
        step = trainer.global_step
        if self._data is None or step == self._measured:
            return
        self._measured = step
        model: Any = pl_module.model
        with evaluating(model), trainer.precision_plugin.forward_context():
            found = {m.name: m(model, self._data) for m in self.measures if m.lacks(model) is None}
        content = {"step": step, "findings": {name: findings.as_plain() for name, findings in found.items()}}
        text = json.dumps(content, allow_nan=False) + "\n"
        write_whole(self.folder / f"{step}.json", partial(Path.write_text, data=text))
        write_scalars(trainer, self._values(found), max(step, 1))

    def _values(self, found: dict[str, Findings]) -> dict[str, float]:
        values: dict[str, float] = {}
        for findings in found.values():
            values |= {f"anatomy/{name}": value for name, value in findings.scalars.items()}
            for name, curve in findings.curves.items():
                if curve.over == "block":
                    pairs = zip(curve.places, curve.values, strict=True)
                    values |= {f"anatomy/block_{n}/{name}": value for n, value in pairs}
        return values
