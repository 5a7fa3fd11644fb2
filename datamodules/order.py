"""Which sample comes when: a pure function of the global sample number and the seed, so nothing has to be stored."""

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
ROUNDS = 4  # a Feistel network is a strong pseudo-random permutation from 4 rounds on (Luby and Rackoff, 1988)


def sample_indices(numbers: Indices, num_samples: int, seed: int) -> Indices:
    """Global sample numbers 0, 1, 2, ... -> indices in [0, num_samples); each epoch is another permutation.

    Memory is that of `numbers`, whatever num_samples is: the permutation is computed, never held.
    """
    out = np.empty_like(numbers)
    epochs = numbers // num_samples
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = permute(numbers[here] % num_samples, num_samples, seed, int(epoch))
    return out


def permute(positions: Indices, num_samples: int, seed: int, epoch: int) -> Indices:
    """A pseudo-random permutation of [0, num_samples), evaluated at the given positions.

    A Feistel network permutes the next power of four; a position that lands outside is sent through it again until it
    lands inside (cycle walking, Black and Rogaway 2002), which keeps it a permutation.
    """
    half_bits = max(1, (max(1, num_samples - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64).astype(np.uint64)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, keys)
        outside = values >= num_samples
    return values.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half_bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> np.uint64(half_bits), values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << np.uint64(half_bits)) | right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer: every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
