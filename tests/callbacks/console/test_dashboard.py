"""The layout of TensorBoard's page, and the table of the model, as a real run writes them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tensorboard.plugins.custom_scalar import layout_pb2

from callbacks.console.dashboard import model_table
from core.tensorboard import FIRST
from tests.support.job import Job
from tests.support.models import make_module
from tests.support.runs import EventAccumulator, events, run, scalars
from tools.curves import read_curves


@pytest.fixture(scope="module")
def written(job: Job) -> EventAccumulator:
    return events(job.folder)


def test_each_chart_has_one_line_a_block_of_one_quantity(written: EventAccumulator) -> None:
    (event,) = written.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    groups = {category.title: [chart.title for chart in category.chart] for category in layout.category}
    assert set(groups) == {
        "overview",
        "gradient norm",
        "update over parameter norm",
        "parameter norm",
        "signal",
        "representation",
        "router",
    }
    assert groups["gradient norm"] == ["all", "norm", "attn_in", "attn_out", "router", "experts"]
    tags = written.Tags()["scalars"]
    for category in layout.category[1:]:
        for chart in category.chart:
            (pattern,) = chart.multiline.tag
            matched = [tag for tag in tags if re.match(pattern, tag)]
            assert [re.findall(r"\d+", tag)[0] for tag in matched] == ["1", "2"], pattern
            assert len({re.sub(r"\d+", "", tag) for tag in matched}) == 1
            worst = re.sub(r"_\d+/", "_worst/", matched[0], count=1)
            assert re.match(pattern, worst), "of more than three blocks the worst one is written, too"


def test_the_overview_comes_first_and_every_line_in_it_is_a_curve(written: EventAccumulator) -> None:
    (event,) = written.Tensors("custom_scalars__config__")
    first = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category[0]
    assert first.title == "overview"
    tags = written.Tags()["scalars"]
    lines = {
        chart.title: [tag for pattern in chart.multiline.tag for tag in tags if re.match(pattern, tag)]
        for chart in first.chart
    }
    assert lines == {
        "loss": ["train/loss", "val/loss", "val/bigram_loss"],
        "learning rate": ["optim/lr"],
        "gradient norm": ["optim/grad_norm"],
        "gradient of the first block over the last one's": ["gradients/first_over_last"],
        "tokens per second": ["train/tokens_per_second"],
    }
    (norms,) = [chart.multiline.tag for chart in first.chart if chart.title == "gradient norm"]
    assert any(re.match(pattern, "divergence/grad_norm") for pattern in norms), "the spikes, where there are some"


def test_time_series_begins_with_an_overview(written: EventAccumulator, job: Job) -> None:
    """Its groups stand by the alphabet, and the curves of one by their numbers; for the tools there is each once."""
    tags = sorted(written.Tags()["scalars"])
    overview = [tag for tag in tags if tag.startswith(tags[0].split("/")[0])]
    named = {FIRST[tag]: tag for tag in tags if tag in FIRST}
    assert [tag.split("/")[1] for tag in overview] == sorted(named)
    assert len(overview) == 7
    for tag in overview:
        same = written.Scalars(named[tag.split("/")[1]])
        assert [(e.step, e.value) for e in written.Scalars(tag)] == [(e.step, e.value) for e in same]
    assert not read_curves(job.folder).keys() & set(overview)


def test_the_baseline_is_a_level_line_over_a_resume(tmp_path: Path) -> None:
    step = ("trainer.val_check_interval=1", "trainer.max_steps=2")
    folder = run(tmp_path, "run", *step)
    expected = json.loads((folder / "summary.json").read_text())["bigram_loss"]
    assert scalars(folder, "val/bigram_loss") == pytest.approx(dict.fromkeys((0, 1), expected))
    run(tmp_path, "run", *step, "trainer.max_steps=3", "ckpt_path=last")
    assert scalars(folder, "val/bigram_loss") == pytest.approx(dict.fromkeys((0, 1, 2), expected))


def test_there_is_no_baseline_where_no_next_token_is_predicted(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", "experiment=mlm_spannorm")
    assert "val/bigram_loss" not in events(folder).Tags()["scalars"]


def test_the_table_of_the_model_is_there(written: EventAccumulator, job: Job) -> None:
    (event,) = written.Tensors("model/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text.splitlines()[2] == "| block | embedding | head | norm | attn_in | attn_out | router | experts | all |"


def test_its_numbers_add_up() -> None:
    module = make_module(num_layers=3)
    assert module.model is not None
    first, _, _, _, *rows = model_table(module).splitlines()
    total = sum(parameter.numel() for parameter in module.model.parameters())
    assert first == f"{total:,} parameters, {total:,} active"
    cells = [[cell.strip().replace(",", "") for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["1", "2", "3", "outside"]
    assert sum(int(row[-1]) for row in cells) == total
    assert all(sum(int(cell or 0) for cell in row[1:-1]) == int(row[-1]) for row in cells)


def test_what_the_run_is_stands_there_once_also_after_a_resume(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", "model.placement=prenorm")
    run(tmp_path, "run", "model.placement=prenorm", "trainer.max_steps=3", "ckpt_path=last")
    written = events(folder)
    assert "epoch" not in written.Tags()["scalars"]
    for tag in ("about", "model"):
        assert [event.step for event in written.Tensors(f"{tag}/text_summary")] == [0], tag
    (event,) = written.Tensors("about/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    rows = dict(re.findall(r"^- \*\*(.+?)\*\* `(.*)`$", text, re.MULTILINE))
    assert "model.placement=prenorm" in rows["asked for"]
    assert rows["length"] == "2 steps of 128 tokens"
    noted = json.loads((folder / "provenance.json").read_text())
    assert {name: str(value) for name, value in noted.items() if value is not None}.items() <= rows.items()
    shutil.copytree(folder / "checkpoints", tmp_path / "elsewhere/checkpoints")
    moved = run(
        tmp_path, "new", "model.placement=prenorm", "trainer.max_steps=4", "ckpt_path=elsewhere/checkpoints/last.ckpt"
    )
    assert len(events(moved).Tensors("about/text_summary")) == 1, "another folder has none yet"
