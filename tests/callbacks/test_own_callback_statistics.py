"""docs/own_pieces.md's callback, from a file outside of the repository: it reads what the monitors have computed."""

import sys
from pathlib import Path

import pytest
import torch

from callbacks import statistics
from tests.support.own_pieces import pieces
from tests.support.runs import scalars, tiny_job, train


def test_the_documented_callback_reads_the_shared_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loudest.py").write_text(pieces()["my_monitor.py"])
    monkeypatch.delitem(sys.modules, "loudest", raising=False)  # another test's, in the same process
    computed, compute = [], statistics._compute
    monkeypatch.setattr(statistics, "_compute", lambda *a: computed.append(a[2]) or compute(*a))
    torch.manual_seed(0)
    finished = train(tmp_path, *tiny_job("run_dir=run"), "+callbacks.mine._target_=loudest.Loudest")
    assert finished.code == 0, finished.err
    assert computed == [1, 2], "two steps, in each of which several monitors asked"
    written = scalars(tmp_path / "run", "mine/loudest_block")
    assert list(written) == [0, 1]
    for step, block in written.items():
        norms = {n: scalars(tmp_path / "run", f"gradients/block_{n}/all")[step] for n in (1, 2)}
        assert block == max(norms, key=norms.__getitem__)
