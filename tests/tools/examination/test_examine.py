"""What runs are measured on together: the same tokens, each with attention as it was trained."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from analysis.anatomy.held_out import HeldOut
from core.errors import ConfigError
from datamodules.images.digits import Digits
from datamodules.synthetic import Synthetic
from tests.support.anatomy import inputs_of, make_text
from tests.support.images import make_vision_module
from tests.support.models import make_module
from tools.examination import examine as examining
from tools.examination.examine import Chosen, as_trained, examine


def places_of(batches: Any, end: int) -> list[list[list[int]]]:
    """Where each input stands in its document, counted from the last end before it."""
    found = []
    for batch in batches:
        rows = []
        for tokens in inputs_of(batch).tolist():
            row: list[int] = []
            for n in range(len(tokens)):
                row.append(0 if n == 0 or tokens[n - 1] == end else row[-1] + 1)
            rows.append(row)
        found.append(rows)
    return found


def positions_of(batches: Any) -> list[Any]:
    return [batch.rows["positions"].tolist() if "positions" in batch.rows else None for batch in batches]


def test_a_text_has_positions_as_a_run_was_trained() -> None:
    """In what is fitted on too."""
    made = make_text(batches=2, vocab_size=4)  # of four tokens one is the end of a document
    text = dataclasses.replace(made, fitting=make_text(batches=3, vocab_size=4).batches)
    end = text.tokenizer.end_of_document
    masked = as_trained(text, document_mask=True)
    assert positions_of(masked.batches) == places_of(text.batches, end)
    assert positions_of(masked.fitting) == places_of(text.fitting, end)
    assert any(0 in row[1:] for batch in positions_of(masked.fitting) for row in batch)
    plain = as_trained(masked, document_mask=False)
    assert positions_of(plain.batches) == [None] * 2
    assert positions_of(plain.fitting) == [None] * 3
    for before, after in ((text, masked), (text, plain)):
        for ours, theirs in zip((*before.batches, *before.fitting), (*after.batches, *after.fitting), strict=True):
            assert torch.equal(inputs_of(ours), inputs_of(theirs))
            assert torch.equal(ours.targets, theirs.targets)
    assert as_trained(masked, document_mask=True) is masked


def test_numbers_of_another_vocabulary_are_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tokenizers have the same name, and nothing in them."""

    def opened(folder: Path, *_: object) -> Any:
        data = Synthetic("copy", int(folder.name), 8, batch_size=2, val_batches=1)
        return SimpleNamespace(folder=folder, datamodule=data, module=make_module())

    def read(*_: object) -> HeldOut:
        raise AssertionError("read")

    monkeypatch.setattr(examining, "open_run", opened)
    monkeypatch.setattr(examining, "held_out", read)
    with pytest.raises(ConfigError, match="RUN='60' is not valid: expected a run whose tokens are those of 50, "):
        examine(Chosen((Path("50"), Path("60")), ("layer_drop",)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mean": (0.5,)}, r"a run whose mean are those of first, \[0\.305\]; this one has \[0\.5\]"),
        ({"std": (0.5,)}, r"a run whose std are those of first, \[0\.376\]; this one has \[0\.5\]"),
        ({"image_size": 16}, r"a run whose image_size are those of first, 8; this one has 16"),
    ],
)
def test_pixels_that_mean_something_else_are_other_images(
    changed: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(folder: Path, *_: object) -> Any:
        data = Digits(batch_size=2, **(changed if folder.name == "second" else {}))
        return SimpleNamespace(folder=folder, datamodule=data, module=make_vision_module())

    monkeypatch.setattr(examining, "open_run", opened)
    with pytest.raises(ConfigError, match=f"RUN='second' is not valid: expected {message}"):
        examine(Chosen((Path("first"), Path("second")), ("layer_drop",)))


def test_data_that_cannot_be_asked_by_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(L.LightningDataModule):
        pass

    def opened(folder: Path, *_: object) -> Any:
        return SimpleNamespace(folder=folder, datamodule=Plain(), module=make_module())

    monkeypatch.setattr(examining, "open_run", opened)
    with pytest.raises(ConfigError, match=r"data\._target_='Plain' is not valid: expected data whose samples can be"):
        examine(Chosen((Path("first"), Path("second")), ("layer_drop",)))
