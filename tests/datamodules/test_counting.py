"""The baseline against its definition."""

import math
from itertools import pairwise

import numpy as np
import pytest

from datamodules.counting import MAX_TABLE, bigram_loss, unigram_loss


def test_against_a_plain_double_loop() -> None:
    rng = np.random.default_rng(0)
    train, samples, vocab_size = rng.integers(0, 7, 200).astype(np.uint16), rng.integers(0, 7, (5, 9)), 7
    total = 0.0
    for row in samples:
        for before, after in pairwise(row):
            pairs = [pair for pair in pairwise(train) if pair[0] == before]
            total -= math.log((sum(pair[1] == after for pair in pairs) + 1) / (len(pairs) + vocab_size))
    assert bigram_loss(train, samples, vocab_size) == pytest.approx(total / 40, rel=1e-12)


def test_frequencies_against_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    train, samples = rng.integers(0, 7, 200).astype(np.uint16), rng.integers(0, 7, (5, 9))
    total = -sum(math.log((sum(t == token for t in train) + 1) / (200 + 7)) for row in samples for token in row[1:])
    assert unigram_loss(train, samples, vocab_size=7) == pytest.approx(total / 40, rel=1e-12)


def test_a_token_never_seen_costs_no_more_than_a_guess() -> None:
    train, samples = np.zeros(10, np.uint16), np.full((1, 2), 3)
    assert bigram_loss(train, samples, vocab_size=1024) == pytest.approx(math.log(1024))


def test_large_vocabularies_against_a_plain_loop() -> None:
    """Witten and Bell's smoothing; one token is never followed by anything, one never comes at all."""
    rng = np.random.default_rng(0)
    train, samples, size = rng.integers(0, 60, 400).astype(np.uint16), rng.integers(0, 62, (5, 9)), MAX_TABLE + 1
    train[-1] = 60
    total = 0.0
    for row in samples:
        for before, after in pairwise(row):
            followers = [pair[1] for pair in pairwise(train) if pair[0] == before]
            frequency = (sum(train == after) + 1) / (len(train) + size)
            distinct = len(set(followers))
            weight = distinct / (len(followers) + distinct) if followers else 1.0
            share = followers.count(after) / len(followers) if followers else 0.0
            total -= math.log((1 - weight) * share + weight * frequency)
    assert bigram_loss(train, samples, size) == pytest.approx(total / 40, rel=1e-12)
