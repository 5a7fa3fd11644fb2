"""Tasks whose best possible loss is known: what a model reaches is its own doing, not the data's."""

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import lookup, require
from core.limits import require_at_most
from datamodules.index import MAX_VOCABULARY
from datamodules.samples import Numbers, Rows
from datamodules.stream_datamodule import StreamDataModule

FloatArray = npt.NDArray[np.float64]
VALIDATION_KEY, NUM_VAL_SAMPLES = 1, 1 << 20  # training is key 0 of the seed


class Task(ABC):
    """A distribution over sequences of seq_len + 1 tokens below vocab_size."""

    def __init__(self, seq_len: int, vocab_size: int) -> None:
        self.seq_len, self.vocab_size = seq_len, vocab_size

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Numbers:
        """Draw one sequence [seq_len + 1]."""

    @abstractmethod
    def optimum(self) -> float:
        """Return the lowest expected loss, in nats per token."""


class Ngram(Task):
    """A Markov chain of order 2: the next token depends on the two before it.

    Its optimum is the entropy rate, but for the first prediction, which sees one token only.
    """

    def __init__(self, seq_len: int, vocab_size: int) -> None:
        super().__init__(seq_len, vocab_size)
        rng = np.random.default_rng(0)  # the chain is the same for every run's seed
        self.transitions: FloatArray = rng.dirichlet([0.1] * vocab_size, (vocab_size, vocab_size))
        pairs = np.full((vocab_size, vocab_size), vocab_size**-2.0)
        for _ in range(10_000):
            following = np.einsum("ab,abc->bc", pairs, self.transitions)
            if np.abs(following - pairs).max() < 1e-15:
                break
            pairs = following
        self.pairs: FloatArray = pairs / pairs.sum()
        self._cumulative = self.transitions.cumsum(2)

    def draw(self, rng: np.random.Generator) -> Numbers:
        first, second = divmod(int(rng.choice(self.vocab_size**2, p=self.pairs.ravel())), self.vocab_size)
        out = [first, second]
        for uniform in rng.random(self.seq_len - 1).tolist():
            cumulative = self._cumulative[out[-2], out[-1]]
            out.append(min(int(np.searchsorted(cumulative, uniform, side="right")), self.vocab_size - 1))
        return np.array(out[: self.seq_len + 1])

    def optimum(self) -> float:
        rate = float((self.pairs * entropy(self.transitions, axis=2)).sum())
        first = float(entropy(self.pairs.ravel(), axis=0) - entropy(self.pairs.sum(1), axis=0))
        return (first + (self.seq_len - 1) * rate) / self.seq_len


class Copy(Task):
    """Random tokens, a separator (the highest token), and the same tokens again."""

    def __init__(self, seq_len: int, vocab_size: int) -> None:
        super().__init__(seq_len, vocab_size)
        require(seq_len % 2 == 0, "data.seq_len", seq_len, "an even number for data.task=copy")

    def draw(self, rng: np.random.Generator) -> Numbers:
        text = rng.integers(0, self.vocab_size - 1, self.seq_len // 2)
        return np.concatenate([text, [self.vocab_size - 1], text])

    def optimum(self) -> float:
        return (self.seq_len // 2 - 1) * math.log(self.vocab_size - 1) / self.seq_len


class Induction(Task):
    """Pairs of a key and its value, then the same pairs in another order: a key that came before tells its value.

    Keys are the lower half of the vocabulary and differ within a sequence, values are drawn from the upper half.
    """

    def __init__(self, seq_len: int, vocab_size: int) -> None:
        super().__init__(seq_len, vocab_size)
        self.num_pairs = (seq_len + 1) // 4
        self.num_keys = vocab_size // 2
        valid = f"4n - 1 with n <= {self.num_keys}, half of data.vocab_size, for data.task=induction"
        require((seq_len + 1) % 4 == 0 and self.num_pairs <= self.num_keys, "data.seq_len", seq_len, valid)

    def draw(self, rng: np.random.Generator) -> Numbers:
        keys = rng.permutation(self.num_keys)[: self.num_pairs]
        values = rng.integers(self.num_keys, self.vocab_size, self.num_pairs)
        pairs = np.stack([keys, values], axis=1)
        return np.concatenate([pairs.ravel(), rng.permutation(pairs).ravel()])

    def optimum(self) -> float:
        keys = sum(math.log(self.num_keys - n) for n in range(1, self.num_pairs))  # the first is given
        values = self.num_pairs * math.log(self.vocab_size - self.num_keys)
        keys_again = sum(math.log(self.num_pairs - n) for n in range(self.num_pairs))
        return (keys + values + keys_again) / self.seq_len


TASKS: dict[str, type[Task]] = {"ngram": Ngram, "copy": Copy, "induction": Induction}


def entropy(probabilities: FloatArray, axis: int) -> npt.NDArray[np.float64]:
    """Return the entropy along an axis, in nats."""
    return -(probabilities * np.log(np.where(probabilities > 0, probabilities, 1.0))).sum(axis)


class TaskSamples:
    """Sample n is drawn with a generator of its own, made of the seed and n."""

    def __init__(self, task: Task, seed: int, key: int) -> None:
        self.task, self.seed, self.key = task, seed, key

    def read(self, numbers: Numbers) -> Rows:
        rngs = (np.random.default_rng([self.seed, self.key, number]) for number in numbers.tolist())
        return {"tokens": np.stack([self.task.draw(rng) for rng in rngs]).astype(np.int64)}


class Synthetic(StreamDataModule):
    """Draws sequences of a task (data=synthetic) and prints the best possible loss.

    Args:
        task: ngram, copy or induction.
        vocab_size: size of the vocabulary.
        seq_len, batch_size, val_batches, num_workers, seed: see StreamDataModule.

    Raises:
        ConfigError: no such task, or a length that it cannot have.
    """

    def __init__(
        self,
        task: str,
        vocab_size: int,
        seq_len: int,
        batch_size: int,
        val_batches: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(seq_len, batch_size, val_batches, num_workers, seed)
        require(vocab_size >= 4, "data.vocab_size", vocab_size, "an integer >= 4")
        require_at_most(MAX_VOCABULARY, "data.vocab_size", vocab_size)
        valid = "at most 128 for data.task=ngram: the table of the chain grows with its cube"
        require(task != "ngram" or vocab_size <= 128, "data.vocab_size", vocab_size, valid)
        self.task_name, self.task = task, lookup("data.task", task, TASKS)(seq_len, vocab_size)
        self.save_hyperparameters()

    @property
    def vocab_size(self) -> int:
        return self.task.vocab_size

    @property
    def num_val_samples(self) -> int:
        return NUM_VAL_SAMPLES

    @property
    def stream_identity(self) -> dict[str, Any]:
        return {**super().stream_identity, "task": self.task_name}

    def samples(self, split: str) -> TaskSamples:
        return TaskSamples(self.task, self.seed, 0) if split == "train" else TaskSamples(self.task, 0, VALIDATION_KEY)

    def setup(self, stage: str) -> None:
        if self.trainer is not None and self.trainer.is_global_zero:
            print(f"{type(self.task).__name__}: no model can get below {self.task.optimum():.4f} nats per token")
