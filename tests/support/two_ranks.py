"""Runs under the Trainer, in one process or in two (gloo), which write down the samples that they trained on."""

import os
import signal
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from core.checkpoint import CheckpointIO
from datamodules.shard_corpus import ShardCorpus
from datamodules.writer import write_corpus
from tests.support.processes import QUIET

SEQ_LEN, BATCH_SIZE, ACCUMULATE, STEPS, LR = 16, 4, 2, 6, 0.1
NUM_SAMPLES = 3 * BATCH_SIZE * ACCUMULATE  # an epoch ends with step 3
END = 256  # of a document


class Job(NamedTuple):
    """A run.

    Attributes:
        name: of what it leaves: NAME-BATCH.ckpt and, of each rank, NAME-RANK.pt.
        path: of the corpus.
        num_processes: which there must be.
        saves: numbers of batches after which a checkpoint is written.
        dies: whether kill -9 ends it after the last of those.
        resumes: name of the checkpoint that it goes on from.
        batch_size, accumulate: those of an optimizer step.
        environment: variables that the path needs.
    """

    name: str
    path: str
    num_processes: int = 1
    saves: tuple[int, ...] = ()
    dies: bool = False
    resumes: str | None = None
    batch_size: int = BATCH_SIZE
    accumulate: int = ACCUMULATE
    environment: tuple[tuple[str, str], ...] = ()


class Recorder(L.LightningModule):
    """Writes down, with every optimizer step, of which batches each was made, and what has become of the weight."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.path, self.seen, self.steps = path, list[Tensor](), list[Tensor]()

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen.append(batch["tokens"])
        return self.weight * batch["tokens"].float().mean()

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        """Lightning warns of validation data without it."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps.append(torch.stack(self.seen))
        self.seen = []

    def on_train_batch_end(self, *_: Any) -> None:
        torch.save({"steps": self.steps, "weight": self.weight.item()}, self.path)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


class SaveAndDie(L.Callback):
    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        if done in self.job.saves:
            trainer.save_checkpoint(self.folder / f"{self.job.name}-{done}.ckpt")
            if self.job.dies and done == max(self.job.saves):
                os.kill(os.getpid(), signal.SIGKILL)


def make_corpus(folder: Path) -> np.ndarray:
    """In shards of 64 tokens, samples that all differ: [NUM_SAMPLES, SEQ_LEN + 1]."""
    tokens = np.random.default_rng(0).integers(0, 256, NUM_SAMPLES * SEQ_LEN, np.uint8)
    documents = [(name, tokens.tobytes(), tokens.astype(np.uint16)) for name in ("train", "val")]
    write_corpus(folder, documents, END, {"vocab_size": 257}, shard_tokens=64)
    ended = np.append(tokens.astype(np.int64), END)
    return np.stack([ended[first : first + SEQ_LEN + 1] for first in range(0, len(tokens), SEQ_LEN)])


def run(folder: Path, job: Job) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=DDPStrategy(process_group_backend="gloo") if job.num_processes > 1 else "auto",
        devices=job.num_processes,
        max_epochs=-1,
        max_steps=STEPS,
        accumulate_grad_batches=job.accumulate,
        limit_val_batches=0,
        callbacks=[SaveAndDie(job, folder)],
        plugins=[CheckpointIO()],
        default_root_dir=folder,
        **QUIET,
    )
    module, cache = Recorder(folder / f"{job.name}-{trainer.global_rank}.pt"), folder / f"cache-{job.name}"
    checkpoint = folder / f"{job.resumes}.ckpt" if job.resumes else None
    with mock.patch.dict(os.environ, job.environment):
        data = ShardCorpus(job.path, SEQ_LEN, job.batch_size, shuffle_block=10, cache_dir=str(cache))
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)


class Record(NamedTuple):
    """What a job did.

    Attributes:
        steps: of each optimizer step the global batches that it was made of, [batches, batch_size, SEQ_LEN + 1].
        weight: at the end.
    """

    steps: list[Tensor]
    weight: float


def record(folder: Path, job: str, num_processes: int) -> Record:
    """What all processes of a job did together."""
    ranks = [torch.load(folder / f"{job}-{rank}.pt") for rank in range(num_processes)]
    steps = [torch.cat(parts, dim=1) for parts in zip(*(rank["steps"] for rank in ranks), strict=True)]
    assert len({rank["weight"] for rank in ranks}) == 1
    return Record(steps, ranks[0]["weight"])
