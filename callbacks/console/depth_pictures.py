"""Shows over depth and time what monitors measure of each block, as pictures in the place of most of the scalars."""

import io
from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from callbacks.console.heat_map import MAX_COLUMNS, History, draw
from callbacks.scalars import ends_and_worst, of_block
from core.errors import require

MAX_PANELS = 12
"""Of one picture: those that were measured first."""
WITHOUT_PANEL = ("_theory",)
"""Endings of figures that do not change over time."""


KEPT = ("blocks", "steps", "values")
"""What a checkpoint has of a quantity: [blocks], [steps], float32 [steps, blocks]."""


class DepthPictures(L.Callback):
    """Draws, for TensorBoard's tab Images, at each validation and at the end:

    | tag | |
    |---|---|
    | PREFIX/depth | of each figure that is logged as PREFIX/block_NUMBER/FIGURE, moe/layer_NUMBER/FIGURE: a heat map |
    | | of block and step, and its profile over depth, now against the first; callbacks/console/heat_map.py |

    Of every quantity up to 256 times are kept, in each checkpoint too: the pictures of a resumed run are those of the
    uninterrupted one. With `blocks=ends` the loggers then get, of a figure that more than three blocks have, only the
    first block's, the last one's, and PREFIX/block_worst/FIGURE: the largest of a maximum, else the one farthest from
    the blocks' median. In `trainer.callback_metrics` there are all. Without this callback the loggers get every
    block's, at most 16 of them, as with `blocks=all`.

    Args:
        blocks: ends or all.

    Raises:
        ConfigError: blocks is neither.
    """

    def __init__(self, blocks: Literal["ends", "all"] = "ends") -> None:
        require(blocks in ("ends", "all"), "callbacks.depth_pictures.blocks", blocks, "ends or all")
        self.blocks = blocks
        self._histories: dict[str, dict[str, History]] = {}  # by prefix and figure

    def choose_scalars(self, values: Mapping[str, float], step: int) -> Mapping[str, float]:
        """Take in what a monitor has measured, and return what the loggers get: callbacks.protocols.ChoosesScalars."""
        found: dict[tuple[str, str], dict[int, float]] = {}
        for name, value in values.items():
            prefix, block, figure = of_block(name) or ("", 0, "")
            if block and "/" not in figure and not figure.endswith(WITHOUT_PANEL):
                found.setdefault((prefix.rpartition("/")[0], figure), {})[block] = value
        for (prefix, figure), by_block in found.items():
            figures, blocks = self._histories.setdefault(prefix, {}), sorted(by_block)
            if len(blocks) < 2:  # nothing over depth
                continue
            if figure not in figures and len(figures) < MAX_PANELS:
                figures[figure] = History(blocks)
            if figure in figures and figures[figure].blocks == blocks:
                figures[figure].add(step, [by_block[block] for block in blocks])
        return ends_and_worst(values) if self.blocks == "ends" else values

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        writers = [logger.experiment.file_writer for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if writers:
            pictures = [
                _as_value(f"{prefix}/depth", draw(figures)) for prefix, figures in self._histories.items() if figures
            ]
            for writer in writers:
                writer.add_summary(Summary(value=pictures), trainer.global_step - 1)

    def state_dict(self) -> dict[str, Any]:
        return {
            f"{prefix}/{figure}": {
                "blocks": torch.tensor(history.blocks),
                "steps": torch.tensor(history.steps),
                "values": torch.from_numpy(np.stack(history.columns)),
            }
            for prefix, figures in self._histories.items()
            for figure, history in figures.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._histories = {}
        for name, kept in state_dict.items() if isinstance(state_dict, dict) else ():
            history = _history_of(kept)
            if history is not None:
                prefix, _, figure = str(name).rpartition("/")
                self._histories.setdefault(prefix, {})[figure] = history


def _as_value(tag: str, picture: Image.Image) -> Summary.Value:
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=3)  # add_image's takes twice the time, for a fifth of the bytes
    size = {"width": picture.width, "height": picture.height, "colorspace": 3}
    return Summary.Value(tag=tag, image=Summary.Image(encoded_image_string=content.getvalue(), **size))


def _history_of(kept: Any) -> History | None:
    """Return what a checkpoint has kept of a quantity; None where that cannot be: the picture then begins anew."""
    if not isinstance(kept, dict) or not all(isinstance(kept.get(name), torch.Tensor) for name in KEPT):
        return None
    blocks, steps, values = (kept[name] for name in KEPT)
    if not blocks.dtype == steps.dtype == torch.int64 or values.dtype != torch.float32:
        return None
    if not blocks.dim() == steps.dim() == 1 or values.shape != (len(steps), len(blocks)):
        return None
    if not 0 < len(steps) <= MAX_COLUMNS or len(blocks) < 2 or (blocks.diff() <= 0).any() or (steps.diff() <= 0).any():
        return None
    return History(blocks.tolist(), steps.tolist(), list(values.cpu().numpy()))
