"""A sample continues text with text, numbers with numbers, and is left out where the prompt means nothing."""

from pathlib import Path

import pytest

from tests.support.runs import events, tiny_job, train

SAMPLE = "callbacks.text_sample={_target_: callbacks.console.text_sample.TextSample, num_tokens: 3, temperature: 0, "
SAMPLE += "prompt: "


@pytest.mark.parametrize(("prompt", "is_there"), [("def ", False), ("3 99", False), ("3 1 4", True)])
def test_a_run_on_numbers_continues_numbers_alone(prompt: str, is_there: bool, tmp_path: Path) -> None:
    job = [argument for argument in tiny_job() if not argument.startswith("data.root=")]
    finished = train(tmp_path, *job, "data=synthetic", "data.seq_len=31", f"{SAMPLE}'{prompt}'}}", "run_dir=run")
    assert finished.code == 0, finished.err
    said = f"No text sample: callbacks.text_sample.prompt='{prompt}' is not valid: expected numbers from 0 to 63"
    assert (said in finished.out) == (not is_there)
    written = events(tmp_path / "run")
    assert ("sample/text_summary" in written.Tags()["tensors"]) == is_there
    if is_there:
        (sample,) = written.Tensors("sample/text_summary")
        text = sample.tensor_proto.string_val[0].decode().split()
        assert text[:3] == ["3", "1", "4"]
        assert len(text) == 6
        assert all(0 <= int(number) < 64 for number in text)
