"""A sample continues text with text, numbers with numbers, and is left out where the prompt means nothing."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.console.text_sample import TextSample
from datamodules.tokenizers import ByteTokenizer
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


def test_nothing_is_compiled_for_it() -> None:
    """Of a model that is compiled for training, a sample of other lengths would take minutes."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    twice = torch.compile(lambda x: 2 * x, backend=backend)

    def generate(prompt: list[int], *_: object, window: int) -> list[int]:
        return [int(number) for number in twice(torch.tensor(prompt))]

    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(tokenizer=ByteTokenizer(), seq_len=8), loggers=[], is_global_zero=True
    )
    module: Any = SimpleNamespace(generate=generate)
    TextSample(prompt="ab", num_tokens=1).on_fit_end(trainer, module)
    assert compiled == []
    twice(torch.tensor([1]))
    assert len(compiled) == 1
