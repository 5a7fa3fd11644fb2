"""What sublayers read of which source: against weights by hand, as numbers and as a picture; absent elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from analysis.states import BlockView, watching
from callbacks.monitors.signal_propagation import SignalPropagation
from callbacks.monitors.source_weights import CELL, SourceWeights, draw
from lightning_modules.layers.rope import rope_tables
from lightning_modules.transformer import Transformer
from tests.support import reference
from tests.support.fitting import Recorder, fit
from tests.support.models import make_module, tokens
from tests.support.norms import in_float64


def by_hand(model: Transformer, batch: Tensor) -> dict[str, list[float]]:
    """The weights of each sublayer of attention residuals in which every output is a source, mean over tokens."""
    rope = rope_tables(batch.size(1), model.config.head_width, model.config.rope_theta, torch.device("cpu"))
    sources, found = [model.embedding(batch)], {}

    def read(key: str, reader: Any) -> Tensor:
        logits = [reference.rms_norm(v, reader.weight, 1e-5) @ reader.query[0] for v in sources]
        shares = torch.stack(logits).exp()
        shares = shares / shares.sum(0)
        found[key] = shares.mean((1, 2)).tolist()
        return sum((s[..., None] * v for s, v in zip(shares, sources, strict=True)), torch.zeros(()))

    for number, block in enumerate(model.blocks, start=1):
        placement: Any = block.placement
        h = sources[0] if number == 1 else read(f"block_{number}/attn", placement.read_attn)
        sources.append(block.attn(placement.norm_attn(h), rope))  # type: ignore[operator]
        sources.append(block.ffn(placement.norm_ffn(read(f"block_{number}/ffn", placement.read_ffn)))[0])  # type: ignore[operator]
    read(f"block_{number}/out", placement.read_out)
    return found


def prefer(module: Any) -> None:
    """Let sublayers have preferences that no start gives them."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("query"):
                parameter.normal_()


@pytest.mark.parametrize("compile", [False, True])
def test_numbers_and_picture_are_the_weights_by_hand(tmp_path: Path, compile: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)  # what is sampled runs eager
    module, recorder = make_module(placement="attnres", compile=compile), Recorder()
    prefer(module)
    assert module.model is not None
    batch = tokens(3, 12)
    with torch.no_grad():
        expected = by_hand(in_float64(module.model), batch[:2, :7])
    board, callbacks = TensorBoardLogger(tmp_path), [SourceWeights(sequences=2, positions=7), SignalPropagation()]
    fit(tmp_path, module, batch, callbacks=callbacks, logger=[recorder, board], max_steps=1)
    logged = {key: value for record in recorder.records for key, value in record.items() if key.startswith("sources/")}
    assert logged == {
        f"sources/{key}/from_{source}": pytest.approx(weight, rel=1e-4)
        for key, weights in expected.items()
        for source, weight in enumerate(weights)
    }
    events = EventAccumulator(board.log_dir, size_guidance={"images": 0})
    events.Reload()
    (image,) = events.Images("sources/weights")
    assert (image.height, image.width) == (CELL * len(expected), CELL * max(map(len, expected.values())))


def test_a_row_of_the_picture_is_a_sublayer() -> None:
    picture = draw([[0.5, 0.5], [0.1, 0.2, 0.7]]).numpy()
    cells = picture[CELL // 2 :: CELL, CELL // 2 :: CELL]
    np.testing.assert_allclose(cells, [[1, 1, 0], [1 / 7, 2 / 7, 1]], rtol=1e-6)
    assert (picture.reshape(2, CELL, 3, CELL) == cells[:, None, :, None]).all()


def test_a_model_without_such_weights_is_not_looked_at(tmp_path: Path) -> None:
    module, recorder, passes = make_module(placement="siamesenorm"), Recorder(), []
    assert module.model is not None
    module.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    fit(tmp_path, module, tokens(2, 9), callbacks=[SourceWeights()], logger=recorder, max_steps=1)
    assert passes == [True]
    assert not [key for record in recorder.records for key in record if key.startswith("sources")]
    assert SourceWeights().charts(module) == {}


def test_of_a_deep_model_a_choice_is_written(tmp_path: Path) -> None:
    module, recorder = make_module(placement="attnres", num_layers=20), Recorder()
    fit(tmp_path, module, tokens(2, 9), callbacks=[SourceWeights()], logger=recorder, max_steps=1)
    keys = {key for record in recorder.records for key in record if key.startswith("sources/")}
    assert len({key.split("/")[1] for key in keys}) == 16
    last = {key for key in keys if key.startswith("sources/block_20/out/")}
    assert len(last) == 16
    assert {"sources/block_20/out/from_0", "sources/block_20/out/from_40"} <= last


def test_the_hidden_state_is_the_mean_of_the_sources_and_its_gradient_that_of_later_readers() -> None:
    module, views = make_module(placement="attnres"), list[BlockView]()
    prefer(module)
    assert module.model is not None
    with watching(module.model, views.append):
        logits, _ = module.model(tokens(2, 9))
    for view in views:
        torch.testing.assert_close(view.after, sum(view.state) / len(view.state), rtol=1e-5, atol=1e-6)
    assert [len(view.state) for view in views] == [3, 5]
    # What reads the embedding behind the last block is the head alone, which cannot be all that reads it.
    first, last = (torch.autograd.grad(logits.sum(), view.state[0], retain_graph=True)[0] for view in views)
    assert not torch.allclose(first, last, rtol=1e-2)
