"""The adapter against the harness' own one, which reads the same model through transformers."""

from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from lightning_modules.pretrained.families import Family
from tests.support.adapter import PAIRS, TEXTS, WINDOW, make_adapter, request
from tools.exporting import native
from tools.exporting.tokenizer import to_hugging_face


@pytest.mark.parametrize("overrides", [{}, {"ffn": "moe"}], ids=["dense", "moe"])
def test_the_harness_own_adapter_finds_the_same_of_the_exported_model(
    overrides: dict[str, Any], tmp_path: Path
) -> None:
    adapter = make_adapter(placement="prenorm", **overrides)
    family = native.find_family(adapter.model)
    assert isinstance(family, Family)
    native.write(adapter.model, family, tmp_path, WINDOW, 256)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = to_hugging_face(adapter.texts, WINDOW)
    theirs = HFLM(exported.eval(), tokenizer=tokenizer, max_length=WINDOW, device="cpu", batch_size=2)
    pairs, texts = [request(*pair) for pair in PAIRS], [request(text) for text in TEXTS[1:]]
    expected, found = (each.loglikelihood(pairs, disable_tqdm=True) for each in (theirs, adapter))
    for (ours, greedy), (reference, greedy_reference) in zip(found, expected, strict=True):
        assert ours == pytest.approx(reference, abs=1e-4)
        assert greedy == greedy_reference
    rolled, reference = adapter.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert rolled == pytest.approx(reference, abs=1e-3, rel=1e-5)
