"""Losses on corpora: what a run's saved configuration asks for is held against what there is."""

from types import SimpleNamespace

import pytest

from core.errors import ConfigError
from tools.evaluation import corpora


def test_a_batch_that_no_memory_holds_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration from elsewhere may have any size of batch; Linux would kill the process for it."""
    module = SimpleNamespace(model_config=SimpleNamespace(dim=8))
    data = SimpleNamespace(batch_size=1 << 20, num_val_samples=100, seq_len=32, source_names=())
    monkeypatch.setattr(corpora, "memory_of_machine", lambda: 4 * 100 * 32 * 8 - 1)
    with pytest.raises(ConfigError, match=r"data.batch_size=1048576 .* takes 102,400 bytes, and .* 102,399"):
        corpora.measure(module, data, "val", 1)
    monkeypatch.setattr(corpora, "memory_of_machine", lambda: 4 * 100 * 32 * 8)
    with pytest.raises(AttributeError, match="samples"):  # of data, which it goes on to
        corpora.measure(module, data, "val", 1)
