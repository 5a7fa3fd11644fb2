"""The baselines that any model has to beat: the frequency of each token, and the previous token predicts the next."""

import math

import numpy as np
import numpy.typing as npt

MAX_VOCABULARY = 1024  # the table of pairs grows with its square


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
    """Return the cross-entropy, in nats per token, of a bigram model with add-one smoothing.

    Args:
        train: token ids to fit on.
        samples: windows [samples, seq_len + 1] to evaluate on, the same that the model is validated on.
        vocab_size: number of tokens, at most MAX_VOCABULARY.
    """
    pairs = train[:-1].astype(np.int64) * vocab_size + train[1:]
    counts = np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size) + 1.0
    log_probabilities = np.log(counts / counts.sum(axis=1, keepdims=True))
    return _loss(log_probabilities[samples[:, :-1], samples[:, 1:]])


def _loss(log_probabilities: npt.NDArray[np.float64]) -> float:
    loss = -float(log_probabilities.mean())
    assert math.isfinite(loss)
    return loss
