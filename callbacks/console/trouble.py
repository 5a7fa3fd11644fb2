"""Says in a line when what a monitor measures leaves the range that docs/metrics.md calls healthy by far."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning as L

from callbacks.scalars import of_block
from core.run_folder import is_main_process

DEAD_EXPERTS, LASTING = "moe/dead_experts", 5
NO_NUMBER = "no number"


class Limit(NamedTuple):
    """Bounds a figure of a block.

    Attributes:
        below, above: what is beyond is trouble.
        words: what that means.
    """

    below: float
    above: float
    words: str


LIMITS = {
    "signal/attn_entropy": Limit(0.02, math.inf, "attention looks at one token alone"),
    "signal/attn_logit_max": Limit(-math.inf, 100.0, "attention's logits grow; model.qk_norm=head bounds them"),
    "signal/kurtosis": Limit(-math.inf, 100.0, "a few features carry everything"),
    "representation/token_cosine": Limit(-math.inf, 0.99, "tokens are told apart no more"),
    "representation/effective_rank": Limit(1.2, math.inf, "all tokens have become one direction"),
}
"""By prefix and figure; wider than what is called healthy, so that a line is worth a look."""


class Trouble(L.Callback):
    """Prints a line the first time that a figure of a block is beyond LIMITS, or that experts stay without a token.

    Of a figure it names the block that is farthest out, and says nothing of that figure again, in a resumed run
    neither. Figures that are no numbers say nothing of what they measure, and get one line together. Experts are named
    where some got no token in five logged steps in a row. GradientHealth says itself where the gradient vanishes or
    explodes.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._dead = 0  # logged steps in a row

    def choose_scalars(self, values: Mapping[str, float], step: int) -> Mapping[str, float]:
        """Look at what a monitor has measured, and leave it as it is: callbacks.protocols.ChoosesScalars."""
        found: dict[str, tuple[float, int, float]] = {}  # how far out, block, value
        no_number: tuple[int, str] | None = None  # the first block, and a figure of it
        for name, value in values.items():
            prefix, block, figure = of_block(name) or ("", 0, "")
            limit = LIMITS.get(key := f"{prefix.removesuffix('/block')}/{figure}")
            if limit is None:
                continue
            if not math.isfinite(value):
                no_number = min(no_number or (block, key), (block, key))
            elif not limit.below <= value <= limit.above:
                out = max(limit.below - value, value - limit.above)
                found[key] = max(found.get(key, (-1.0, 0, 0.0)), (out, block, value))
        if no_number is not None:
            block, key = no_number
            self._say(NO_NUMBER, f"step {step}: figures of the blocks are no numbers: {key} from block {block} on")
        for key, (_, block, value) in found.items():
            self._say(key, f"step {step}: {LIMITS[key].words}: {key} is {value:.3g} in block {block}")
        if DEAD_EXPERTS in values:
            dead = int(values[DEAD_EXPERTS])
            self._dead = self._dead + 1 if dead else 0
            if self._dead >= LASTING:
                line = f"step {step}: {dead} experts got no token in {LASTING} logged steps in a row"
                self._say(DEAD_EXPERTS, f"{line}; moe/depth in TensorBoard's images shows in which layers")
        return values

    def _say(self, key: str, line: str) -> None:
        if key not in self._said and is_main_process():
            print(line, flush=True)
        self._said.add(key)

    def state_dict(self) -> dict[str, Any]:
        return {"said": sorted(self._said)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        said = state_dict.get("said") if isinstance(state_dict, dict) else None
        self._said = {key for key in said if isinstance(key, str)} if isinstance(said, list) else set()
