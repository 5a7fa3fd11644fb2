"""The transformer of images: patches in, logits over classes out (ViT, 2010.11929)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import ConfigError, require, suggest
from core.limits import require_at_most
from lightning_modules.config import ModelConfig
from lightning_modules.layers.cpu_kernels import use_cpu_kernels
from lightning_modules.layers.ffn import linear
from lightning_modules.layers.rope import Rope
from lightning_modules.layers.rope_2d import rope_tables_2d
from lightning_modules.layers.router import RouterStats
from lightning_modules.trunk import Asked, Batch, Block, Count, Entry, Trunk
from spannorm import Matrix

POSITIONS, POOLS = ("learned", "rope"), ("class_token", "mean")
MAX_POSITIONS, MAX_CLASSES = 2**20, 2**24


@dataclass(frozen=True)
class ImageConfig:
    """Says what images are made of, and how they become a stream and a class.

    Attributes:
        image_size: height and width in pixels.
        num_channels: of each pixel.
        num_classes: to tell apart.
        patch_size: height and width of a patch, which divide those of the image.
        positions: learned, a vector for each position added to the patches; or rope, rotary in two dimensions.
        pool: what the head reads: class_token, one more position in front of the patches; or mean, over all patches.

    Raises:
        ConfigError: a size or name that cannot be.
    """

    image_size: int
    num_channels: int
    num_classes: int
    patch_size: int
    positions: str
    pool: str

    def __post_init__(self) -> None:
        for name in ("image_size", "num_channels"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "an integer >= 1")
        require(self.num_classes >= 2, "data.num_classes", self.num_classes, "an integer >= 2")
        require_at_most(MAX_CLASSES, "data.num_classes", self.num_classes)
        fits = self.patch_size >= 1 and self.image_size % self.patch_size == 0
        valid = f"a divisor of data.image_size={self.image_size}"
        require(fits, "module.patch_size", self.patch_size, valid)
        require_at_most(MAX_POSITIONS, "module.patch_size", self.num_patches)
        for field, value, names in (("positions", self.positions, POSITIONS), ("pool", self.pool, POOLS)):
            if value not in names:
                raise ConfigError(f"module.{field}", value, suggest(value, names))

    @property
    def grid(self) -> int:
        """Return how many patches there are in a row, and in a column."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def num_positions(self) -> int:
        """Return how many vectors go through the blocks."""
        return self.num_patches + (self.pool == "class_token")

    @property
    def patch_values(self) -> int:
        """Return how many numbers a patch has."""
        return self.num_channels * self.patch_size**2


class VisionTransformer(Trunk):
    """Projection of patches, positions, blocks, classifier.

    Args:
        config: the architecture of the blocks; not causal.
        images: what goes in and comes out.
        output_multiplier: on what the head reads; not 1 only under width scaling.
        branch_multiplier: on what each attention and FFN puts out; not 1 only under depth scaling.
        built: called with each block as soon as it is built.

    Raises:
        ConfigError: as of Trunk; or causal attention, tied embeddings, or heads that cannot be turned both ways.
    """

    def __init__(
        self,
        config: ModelConfig,
        images: ImageConfig,
        output_multiplier: float = 1.0,
        branch_multiplier: float = 1.0,
        built: Callable[[Block], None] = lambda block: None,
    ) -> None:
        super().__init__(config, output_multiplier, branch_multiplier)
        require(not config.causal, "model.causal", True, "false for images: a patch looks at all others")
        require(not config.tie_embeddings, "model.tie_embeddings", True, "false for images: patches are no classes")
        valid = "null for images: the classes are those of the data"
        require(config.vocab_size is None, "model.vocab_size", config.vocab_size, valid)
        turns = images.positions != "rope" or config.head_width % 4 == 0
        valid = "a multiple of 4 with module.positions=rope, which turns pairs by row and by column"
        require(turns, "model.head_dim", config.head_width, valid)
        self.images = images
        self.embedding = linear(images.patch_values, config.dim, config.bias)
        learned = images.positions == "learned"
        self.position = nn.Parameter(torch.zeros(images.num_positions, config.dim)) if learned else None
        pooled = images.pool == "class_token"
        self.class_token = nn.Parameter(torch.zeros(config.dim)) if pooled else None
        self.add_blocks(built)
        self.head = linear(config.dim, images.num_classes, config.bias)
        if config.cpu_kernels == "auto":
            use_cpu_kernels(self.embedding)
            use_cpu_kernels(self.head)

    def forward(self, images: Tensor) -> tuple[Tensor, list[RouterStats]]:
        """Return (logits [batch, classes], one RouterStats per MoE layer).

        Args:
            images: [batch, channels, height, width].
        """
        state, router_stats = self.through_blocks(self.embed(images), self.rope(images.device))
        return self.read_out(state), router_stats

    def embed(self, images: Tensor) -> Tensor:
        """Return what the blocks begin with, [batch, positions, dim]: the class token, where there is one, and patches.

        A patch's numbers are in the order channel, row, column; patches follow each other row by row.
        """
        size = self.images.patch_size
        images = images.to(self.embedding.weight.dtype)  # a batch that no Trainer has handed out is in fp32
        patches = images.unflatten(2, (-1, size)).unflatten(4, (-1, size))  # [batch, channel, i, row, j, column]
        stream: Tensor = self.embedding(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        if self.class_token is not None:
            stream = torch.cat((self.class_token.to(stream.dtype).expand(len(stream), 1, -1), stream), dim=1)
        return stream if self.position is None else stream + self.position

    def rope(self, device: torch.device) -> Rope | None:
        """Return the tables of rotary positions; None where positions are learned."""
        if self.position is not None:
            return None
        grid, before = self.images.grid, self.images.num_positions - self.images.num_patches
        return rope_tables_2d(grid, grid, self.config.head_width, self.config.rope_theta, before, device)

    def read_out(self, state: Tensor) -> Tensor:
        """Return the logits [batch, classes] of what the last block has returned, [batch, positions, dim]."""
        return self.logits(self.pooled(state))

    def pooled(self, state: Tensor) -> Tensor:
        """Return what the head reads of each image, [batch, dim]."""
        return state.mean(dim=1) if self.class_token is None else state[:, 0]

    def count(self, batch: Batch) -> Count:
        samples = len(batch["images"])
        return Count(samples, self.images.num_positions, samples)

    def can_read(self, batch: Batch) -> bool:
        images, labels, size = batch.get("images"), batch.get("labels"), self.images
        if images is None or labels is None or not images.is_floating_point() or labels.is_floating_point():
            return False
        shape = (size.num_channels, size.image_size, size.image_size)
        if len(images) == 0 or images.shape[1:] != shape or labels.shape != images.shape[:1]:
            return False
        return int(labels.min()) >= 0 and int(labels.max()) < size.num_classes

    def excerpt(self, batch: Batch, samples: int, positions: int | None = None) -> Batch:
        """Return the first images, which are whole whatever `positions` says."""
        return {name: batch[name][:samples] for name in ("images", "labels")}

    def observe(self, batch: Batch) -> None:
        self(batch["images"])

    def loss(self, batch: Batch, chunked: bool = False) -> Tensor:
        """Return the mean cross-entropy of the classes, in nats; there are never so many that it would be chunked."""
        logits, _ = self(batch["images"])
        return F.cross_entropy(logits.float(), batch["labels"])

    def tokens(self, batch: Batch) -> None:
        return None

    def entry(self, batch: Batch) -> Entry:
        return Entry(self.embed(batch["images"]), self.rope(batch["images"].device))

    def asked(self, batch: Batch) -> Asked:
        """Return the class of each image."""
        labels = batch["labels"][:, None]
        return Asked(labels, torch.zeros_like(labels))

    def read(self, state: Tensor, batch: Batch) -> Tensor:
        return self.pooled(state)[:, None]

    def logits(self, read: Tensor) -> Tensor:
        logits: Tensor = self.head(read * self.output_multiplier)
        return logits

    def losses(self, read: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(read).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def example(self, samples: int, positions: int, generator: torch.Generator | None = None) -> Batch:
        """Return images of independent, standard normal pixels."""
        size = self.images
        shape = (samples, size.num_channels, size.image_size, size.image_size)
        labels = torch.randint(size.num_classes, (samples,), generator=generator)
        return {"images": torch.randn(shape, generator=generator), "labels": labels}

    def embedding_std(self, stds: dict[Tensor, float]) -> float:
        """Return it for pixels of unit variance."""
        variance = self.images.patch_values * stds[self.embedding.weight] ** 2
        if self.position is not None:
            variance += stds[self.position] ** 2
        return float(variance**0.5)

    def outside_matrices(self) -> Iterator[Matrix]:
        dim, images = self.config.dim, self.images
        # What a patch has does not grow with the model. Tables are added as they are, like the row of a lookup.
        yield Matrix("embedding", self.embedding.weight, images.patch_values, dim, width_is_explicit=True)
        for table in (self.position, self.class_token):
            if table is not None:
                yield Matrix("embedding", table, 1, dim)
        yield Matrix("head", self.head.weight, dim, images.num_classes)

    def num_looked_up(self) -> int:
        """Return it per position: the head reads one vector an image."""
        tables = sum(table.numel() for table in (self.position, self.class_token) if table is not None)
        return tables + self.head.weight.numel() * (self.images.num_positions - 1) // self.images.num_positions
