"""The held-out text: its tokens, its documents, what is added up by them; and the way of a batch through a model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.anatomy.held_out import Tally, held_out
from analysis.anatomy.passage import Passage
from core.errors import ConfigError
from datamodules.synthetic import Synthetic
from tests.support.anatomy import MODELS, inputs_of, make_text, text_batch, trained_like
from tests.support.models import make_module
from tests.support.runs import TEXT, TinyData


def test_the_text_is_the_beginning_of_the_validation_sample(tmp_path: Path) -> None:
    data = TinyData(tmp_path, document_mask=True)
    data.prepare_data()
    module = make_module(vocab_size=257)
    text = held_out(data, module, 200, fitting_positions=70)  # seven sequences of 32
    assert [len(inputs_of(batch)) for batch in text] == [4, 3]
    assert (text.num_targets, sum(inputs_of(batch).numel() for batch in text.fitting)) == (224, 96)
    expected = next(iter(data.val_dataloader()))
    first = text.batches[0]
    assert torch.equal(first.rows["tokens"], expected["tokens"])
    assert torch.equal(first.targets, expected["tokens"][:, 1:])
    assert torch.equal(first.rows["positions"], expected["positions"])
    trained_on = torch.from_numpy(data.samples("train").read(np.arange(3))["tokens"])
    assert torch.equal(torch.cat([inputs_of(batch) for batch in text.fitting]), trained_on[:, :-1])
    assert not torch.equal(trained_on, expected["tokens"][:3])
    assert text.targets_by_document.sum() == 224
    assert text.num_documents == len(text.targets_by_document) == 1  # there is one document to validate on
    again = held_out(data, module, 200, batch_size=7)
    assert len(again.batches) == 1
    assert torch.equal(inputs_of(again.batches[0]), torch.cat([inputs_of(batch) for batch in text]))


def test_more_than_there_is_is_all_that_there_is(tmp_path: Path) -> None:
    data = TinyData(tmp_path, val_batches=2)  # which the text does not stop at
    data.prepare_data()
    text = held_out(data, make_module(vocab_size=257), 10**6)
    windows = (len(TEXT) // 10 - 1) // 32  # of a tenth of the corpus
    assert text.num_targets == 32 * windows
    held_out_bytes = TEXT[9 * (len(TEXT) // 10) :]
    expected = sorted(list(held_out_bytes[32 * n : 32 * (n + 1)]) for n in range(windows))
    assert sorted(torch.cat([inputs_of(batch) for batch in text]).tolist()) == expected, "each window once"


def test_sequences_are_documents_where_data_have_none() -> None:
    data = Synthetic(task="copy", seq_len=8, vocab_size=16, batch_size=2, val_batches=2, num_workers=0, seed=0)
    text = held_out(data, make_module(), 40)
    assert text.targets_by_document.tolist() == [8.0] * 5


@pytest.mark.parametrize(("num_tokens", "batch_size", "field"), [(0, None, "tokens"), (5, 0, "batch_size")])
def test_sizes_below_one_are_refused(tmp_path: Path, num_tokens: int, batch_size: int | None, field: str) -> None:
    data = TinyData(tmp_path)
    data.prepare_data()
    with pytest.raises(ConfigError, match=f"{field}=0 is not valid: expected an integer >= 1"):
        held_out(data, make_module(vocab_size=257), num_tokens, batch_size)


def test_each_batch_handed_out_is_told() -> None:
    seen: list[int] = []
    text = make_text(batches=3).watched(lambda: seen.append(1))
    assert [len(list(text)), len(list(text)), len(seen)] == [3, 3, 6]


def test_what_tokens_have_is_added_up_by_document() -> None:
    text = make_text()  # of six sequences the first two are one document
    tally = Tally(text, 2)
    for number, batch in enumerate(text):
        tally.add(1, batch, torch.full(batch.targets.shape, float(number + 1)))
    np.testing.assert_array_equal(tally.sums, [[0.0] * 5, [24.0, 12.0, 24.0, 24.0, 24.0]])


@pytest.mark.parametrize(("placement", "ffn"), MODELS)
def test_the_way_through_a_model_is_its_forward_pass(placement: str, ffn: str) -> None:
    """With attention that does not cross documents, too."""
    model = trained_like(placement=placement, ffn=ffn, num_layers=2)
    tokens = make_text(batches=1).batches[0]
    positions = (torch.arange(12) % 7).expand(3, -1)
    for places in (None, positions):
        batch = text_batch(tokens.rows["tokens"], tokens.documents, places)
        with torch.no_grad():
            passage = Passage(model, batch)
            last = passage.states()[-1]
            assert torch.equal(passage.logits(last), model(inputs_of(batch), places)[0])
            assert torch.equal(
                passage.losses(last), model(inputs_of(batch), places, targets=batch.targets)[0].by_token.view(3, 12)
            )
