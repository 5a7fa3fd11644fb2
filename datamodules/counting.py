"""The baselines that any model has to beat: the frequency of each token, and the previous token predicts the next."""

import math

import numpy as np
import numpy.typing as npt

MAX_TABLE = 1024
"""Largest vocabulary with a table of all pairs. One added to each would spoil a larger one: most pairs never come."""
MAX_VOCABULARY = 1 << 16
"""Largest vocabulary of which pairs are counted at all."""


def unigram_loss(train: npt.NDArray[np.uint16], samples: npt.NDArray[np.int64], vocab_size: int) -> float:
    """Return the cross-entropy, in nats per token, of the tokens' frequencies with add-one smoothing.

    Args:
        train: token ids to fit on.
        samples: windows [samples, seq_len + 1] to evaluate on, the same that the model is validated on.
        vocab_size: number of tokens.
    """
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return _loss(np.log(counts / counts.sum())[samples[:, 1:]])


def bigram_loss(train: npt.NDArray[np.uint16], samples: npt.NDArray[np.int64], vocab_size: int) -> float:
    """Return the cross-entropy, in nats per token, of a bigram model.

    Up to MAX_TABLE tokens it is smoothed by adding one to each pair. Beyond that, by Witten and Bell (1991): a token
    that was followed n times by t different ones gives the weight t / (n + t) to the tokens' frequencies.

    Args:
        train: token ids to fit on.
        samples: windows [samples, seq_len + 1] to evaluate on, the same that the model is validated on.
        vocab_size: number of tokens, at most MAX_VOCABULARY.
    """
    pairs = train[:-1].astype(np.int64) * vocab_size + train[1:]
    if vocab_size > MAX_TABLE:
        return _witten_bell(train, pairs, samples, vocab_size)
    counts = np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size) + 1.0
    log_probabilities = np.log(counts / counts.sum(axis=1, keepdims=True))
    return _loss(log_probabilities[samples[:, :-1], samples[:, 1:]])


def _witten_bell(
    train: npt.NDArray[np.uint16],
    pairs: npt.NDArray[np.int64],
    samples: npt.NDArray[np.int64],
    vocab_size: int,
) -> float:
    seen, counts = np.unique(pairs, return_counts=True)
    first = seen // vocab_size
    followed = np.bincount(first, weights=counts, minlength=vocab_size)
    different = np.bincount(first, minlength=vocab_size)
    frequencies = np.bincount(train, minlength=vocab_size) + 1.0
    frequencies /= frequencies.sum()
    before, after = samples[:, :-1], samples[:, 1:]
    wanted = before * vocab_size + after
    at = np.minimum(np.searchsorted(seen, wanted), len(seen) - 1)
    count = np.where(seen[at] == wanted, counts[at], 0)
    new = np.maximum(different[before], 1)  # a token that nothing has followed: the frequencies alone
    return _loss(np.log((count + new * frequencies[after]) / (followed[before] + new)))


def _loss(log_probabilities: npt.NDArray[np.float64]) -> float:
    loss = -float(log_probabilities.mean())
    assert math.isfinite(loss)
    return loss
