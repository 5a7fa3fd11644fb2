"""Orders samples by a pure function of the global sample number and the seed, so nothing has to be stored."""

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
ROUNDS = 4  # a Feistel network is a strong pseudo-random permutation from 4 rounds on (Luby and Rackoff, 1988)


def sample_indices(numbers: Indices, num_samples: int, seed: int, block: int | None = None) -> Indices:
    """Return indices in [0, num_samples) of global sample numbers 0, 1, 2, ...; each epoch is another permutation.

    Memory is that of `numbers`, whatever num_samples is: the permutation is computed, never held.

    Args:
        numbers: non-negative.
        num_samples: how many there are.
        seed: of the order.
        block: None shuffles the whole epoch. A number shuffles blocks of so many neighbouring samples, and the samples
            within a block: what is read at one time then lies in few shards, which matters where they are far away.
    """
    out = np.empty_like(numbers)
    epochs = numbers // num_samples
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        positions = numbers[here] % num_samples
        if block is None or block >= num_samples:
            out[here] = permute(positions, num_samples, seed, epoch)
        else:
            out[here] = _permute_blocks(positions, num_samples, seed, epoch, block)
    return out


def block_bounds(number: int, num_samples: int, seed: int, block: int | None = None) -> tuple[int, int]:
    """Return (first index, number) of the indices among which this sample is; they go on at 0 after the last."""
    if block is None or block >= num_samples:
        return 0, num_samples
    epoch, position = divmod(number, num_samples)
    place, size = _block_places(np.array([position // block]), num_samples, seed, epoch, block)
    return int((place[0] + _rotation(num_samples, seed, epoch)) % num_samples), int(size[0])


def _permute_blocks(positions: Indices, num_samples: int, seed: int, epoch: int, block: int) -> Indices:
    """Lay blocks of neighbours over the samples from a new starting point each epoch, in random order.

    The starting point keeps the remainder, a shorter block that always comes last, from being the same samples.
    """
    out = np.empty_like(positions)
    numbers = positions // block
    for number in np.unique(numbers).tolist():
        here = numbers == number
        place, size = _block_places(np.array([number]), num_samples, seed, epoch, block)
        out[here] = place + permute(positions[here] % block, int(size[0]), seed, epoch, number + 1)
    return (out + _rotation(num_samples, seed, epoch)) % num_samples


def _block_places(numbers: Indices, num_samples: int, seed: int, epoch: int, block: int) -> tuple[Indices, Indices]:
    """Return (where the blocks of these numbers begin, their sizes), before the rotation."""
    whole, rest = divmod(num_samples, block)
    places = permute(np.minimum(numbers, whole - 1), whole, seed, epoch) * block
    is_rest = numbers == whole
    return np.where(is_rest, whole * block, places), np.where(is_rest, rest, block)


def _rotation(num_samples: int, seed: int, epoch: int) -> int:
    return int(permute(np.zeros(1, np.int64), num_samples, seed, epoch)[0])


def permute(positions: Indices, num_samples: int, *key: int) -> Indices:
    """Return a pseudo-random permutation of [0, num_samples) at the given positions; each key is another one.

    A Feistel network permutes the next power of four; a position that lands outside is sent through it again until it
    lands inside (cycle walking, Black and Rogaway 2002), which keeps it a permutation.
    """
    half_bits = max(1, (max(1, num_samples - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64).astype(np.uint64)
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
    """Return SplitMix64's finalizer of x: every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
