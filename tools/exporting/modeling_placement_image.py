"""A classifier of images that normalizes where a placement says.

Blocks, attention and mixtures are those of modeling_placement.py; here are the patches in front of them, and what
becomes of their output. Every argument that transformers passes is used, or refused by a ValueError that names it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from tools.exporting.modeling_placement import Block, PlacementConfig, PlacementPreTrainedModel, require


class PlacementImageConfig(PlacementConfig):
    """Says what the model is made of: the blocks as PlacementConfig does, and beside them the images.

    Args:
        image_size: height and width in pixels.
        num_channels: of each pixel.
        patch_size: height and width of a patch.
        positions: learned, a vector for each position; or rope, rotary by row and column.
        pool: what the head reads: class_token, or mean over the patches.
        others: PlacementConfig's; num_labels, and what else every configuration has.
    """

    model_type = "placement_image"

    def __init__(
        self,
        image_size: int = 224,
        num_channels: int = 3,
        patch_size: int = 16,
        positions: str = "learned",
        pool: str = "class_token",
        **others: Any,
    ) -> None:
        self.image_size = image_size
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.positions = positions
        self.pool = pool
        super().__init__(**{"causal": False, "use_cache": False, **others})

    @property
    def grid(self) -> int:
        """Return how many patches there are in a row, and in a column."""
        return self.image_size // self.patch_size


def rotary_grid(config: PlacementImageConfig, before: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin, fp32 [positions, head_dim]: half of the pairs turn with the row, half with the column.

    Args:
        config: of the model.
        before: positions in front of the patches, which are not turned.
        device: of the result.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** -(torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    angles = torch.arange(config.grid, device=device).float()[:, None] * frequencies
    rows, columns = angles.repeat_interleave(config.grid, dim=0), angles.repeat(config.grid, 1)
    angles = torch.cat((torch.zeros(before, half, device=device), torch.cat((rows, columns), dim=-1)))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class PlacementImageModel(nn.Module):
    """Patches, positions, blocks and head; the head is here because of its weight's name."""

    def __init__(self, config: PlacementImageConfig) -> None:
        super().__init__()
        require(config.positions in ("learned", "rope"), "positions", config.positions, "learned or rope")
        require(config.pool in ("class_token", "mean"), "pool", config.pool, "class_token or mean")
        self.config = config
        self.num_before = int(config.pool == "class_token")
        self.embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size, bias=config.bias)
        if config.positions == "learned":
            self.position = nn.Parameter(torch.zeros(self.num_before + config.grid**2, config.hidden_size))
        if config.pool == "class_token":
            self.class_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.blocks = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, len(config.id2label or {}), bias=config.bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return what the head reads, [batch, hidden_size], of pixels [batch, channels, height, width]."""
        size, config = self.config.patch_size, self.config
        patches = pixel_values.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        stream = self.embedding(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        if self.num_before:
            stream = torch.cat((self.class_token.expand(len(stream), 1, -1), stream), dim=1)
        rope = None
        if config.positions == "learned":
            stream = stream + self.position
        else:
            rope = rotary_grid(config, self.num_before, stream.device)
        state: Any = stream
        for block in self.blocks:
            state, _ = block(state, rope)
        pooled: Tensor = state[:, 0] if self.num_before else state.mean(dim=1)
        return pooled


class PlacementForImageClassification(PlacementPreTrainedModel):
    """The classifier with its loss.

    New weights, which a model has that is made from a configuration alone, are drawn as transformers draws them.
    """

    config: PlacementImageConfig
    config_class = PlacementImageConfig
    main_input_name = "pixel_values"

    def __init__(self, config: PlacementImageConfig) -> None:
        super().__init__(config)
        self.hold(PlacementImageModel(config))

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Return the logits of the classes, and a loss where there are labels.

        Args:
            pixel_values: [batch, channels, image_size, image_size], normalized as in training.
            labels: [batch], the number of each image's class.
            return_dict: false: a tuple.
            others: refused, unless they are None or false.

        Returns:
            loss, logits [batch, num_labels]. The auxiliary losses of mixtures are not in the loss.

        Raises:
            ValueError: an argument that this model cannot serve.
        """
        for name, value in others.items():
            valid = "nothing: this model has no such argument"
            require(value is None or value is False, name, type(value).__name__, valid)
        size = self.config.image_size
        wanted = (self.config.num_channels, size, size)
        fits = pixel_values.dim() == 4 and tuple(pixel_values.shape[1:]) == wanted
        require(fits, "pixel_values", list(pixel_values.shape), f"a tensor [batch, {', '.join(map(str, wanted))}]")
        pooled = self.model(pixel_values.to(self.model.embedding.weight.dtype))
        logits = self.model.head(pooled * self.config.output_multiplier)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        out = ImageClassifierOutput(loss=loss, logits=logits)
        return out.to_tuple() if return_dict is False else out
