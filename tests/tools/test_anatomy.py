"""tools.anatomy: the report of tiny runs, its figures, pictures and events; and what is refused."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from analysis.anatomy.bootstrap import FEWEST
from analysis.anatomy.held_out import held_out
from analysis.anatomy.layer_drop import SKIPS, LayerDrop
from analysis.anatomy.similarity import CrossSimilarity
from core import cli
from core.errors import ConfigError
from core.open_run import open_run
from tests.support.anatomy import inputs_of, make_text
from tests.support.pretrained import add_tokenizer, saved
from tests.support.tool_runs import bpe_corpus, bpe_run, byte_run
from tools import anatomy, compare
from tools.examination.examine import Chosen, Examined, examine
from tools.examination.report import Report, write
from tools.examination.steps import FOLDER, kept_of
from tools.importing import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A PreNorm and a SpanNorm model of two blocks, on the same bytes; the second of longer sequences."""
    folders = []
    for placement, more in (("prenorm", ()), ("spannorm", ("data.seq_len=64", "model.ffn=moe"))):
        cwd = tmp_path_factory.mktemp(placement)
        folders.append(byte_run(cwd, f"model.placement={placement}", *more))
    return folders


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as leaving:
        cli.run(lambda: anatomy.main([str(argument) for argument in arguments]))
    assert leaving.value.code == 2
    return capsys.readouterr().err.strip()


@pytest.fixture(scope="module")
def report(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report") / "both"
    anatomy.main([*map(str, runs), "tokens=300", f"output={output}"])
    return output


@pytest.mark.slow
def test_two_runs_stand_side_by_side(report: Path, runs: list[Path]) -> None:
    content = json.loads((report / "report.json").read_text())
    assert content["text"]["tokens"] == 336  # seven sequences of the shorter length
    assert sum(content["text"]["tokens_by_document"]) == 336
    assert [run["placement"] for run in content["runs"]] == ["prenorm", "spannorm"]
    first, second = (set(run["findings"]) for run in content["runs"])
    assert second - first == {"cross_similarity", "expert_share", "expert_drop", "expert_similarity"}
    assert content["runs"][0]["left_out"]["expert_drop"] == "it has no mixture of experts"
    text = (report / "report.md").read_text()
    pictures = set(re.findall(r"!\[[^]]*\]\((\S+)\)", text))
    assert pictures == {path.name for path in report.glob("*.png")}
    assert {"layer_drop.png", "pruning.png", "cka.png", "lens_divergence.png", "cross_cka.png"} <= pictures
    assert "Less that of" in text
    assert "under SpanNorm N(x)" in text


def test_the_second_moments_are_those_of_the_checkpoint(report: Path) -> None:
    """Both runs went to the end of the schedule, at a tenth of the peak rate of 3e-3."""
    content = json.loads((report / "report.json").read_text())
    for run in content["runs"]:
        scalars = run["findings"]["sharpness"]["scalars"]
        assert scalars["preconditioned_sharpness"] > 0
        assert scalars["peak_stability_threshold"] == pytest.approx(38 / 3e-3, rel=1e-4)
        assert scalars["stability_threshold"] == pytest.approx(38 / 3e-4, rel=1e-4)


def test_the_figures_are_those_of_the_measure_by_itself(report: Path, runs: list[Path]) -> None:
    """As a notebook would call it, and the loss is that of tools.evaluate's."""
    content = json.loads((report / "report.json").read_text())
    for number, folder in enumerate(runs):
        opened = open_run(folder)
        opened.datamodule.prepare_data()
        opened.datamodule.seq_len = 48
        text = held_out(opened.datamodule, opened.module, 300)
        found = LayerDrop()(opened.module.model, text)
        reported = content["runs"][number]["findings"]["layer_drop"]
        assert reported["curves"]["drop_by_block"]["values"] == pytest.approx(
            found.curves["drop_by_block"].values, rel=1e-4, abs=1e-7
        )
        with torch.no_grad():
            losses = [opened.module(inputs_of(b), None, b.targets)[0].by_token for b in text]
        assert reported["scalars"]["loss"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)


def test_comparisons_are_of_the_first_run_and_the_other(report: Path, runs: list[Path]) -> None:
    first, second = (open_run(folder) for folder in runs)
    first.datamodule.prepare_data()
    text = held_out(first.datamodule, first.module, 300)
    assert first.datamodule.seq_len == 48
    found = CrossSimilarity()(first.module.model, second.module.model, text).matrices["cross_cka"]
    reported = json.loads((report / "report.json").read_text())["runs"][1]["findings"]["cross_similarity"]
    np.testing.assert_allclose(reported["matrices"]["cross_cka"], found, rtol=1e-4)
    np.testing.assert_raises(AssertionError, np.testing.assert_allclose, found, np.transpose(found), rtol=1e-2)


@pytest.mark.slow
def test_fields_reach_what_they_are_for(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def found(*arguments: str) -> dict[str, Any]:
        output = tmp_path / f"report{len(list(tmp_path.iterdir()))}"
        anatomy.main([*arguments, "tokens=200", f"output={output}"])
        (run,) = json.loads((output / "report.json").read_text())["runs"]
        findings: dict[str, Any] = run["findings"]
        return findings

    folder = runs[1]
    content = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    content["state_dict"]["model.head.weight"].zero_()
    torch.save(content, tmp_path / "blank.ckpt")
    findings = found(str(folder), "measures=layer_drop", f"checkpoint={tmp_path / 'blank.ckpt'}")
    assert findings["layer_drop"]["scalars"]["loss"] == pytest.approx(math.log(257), abs=1e-5)

    with mock.patch("tools.examination.examine.held_out", wraps=held_out) as read:
        found(str(folder), "measures=sharpness", "batch_size=1")
    assert read.call_args.args[3] == 1, "no figure depends on it"

    without: list[float] = []
    for skip in ("identity", "placement"):
        findings = found(str(folder), "measures=layer_drop,pruning", f"skip={skip}")
        curves = {name: curve for part in findings.values() for name, curve in part["curves"].items()}
        without.append(curves["pruning_by_count"]["values"][-1])
        assert without[-1] == pytest.approx(curves["cut_by_count"]["values"][-1], abs=1e-6), "both without all blocks"
        (note,) = findings["pruning"]["notes"]
        assert note == SKIPS[skip]
    assert without[0] != pytest.approx(without[1], abs=1e-3)

    own = shutil.copytree(folder, tmp_path / "own")
    config = (own / "config.yaml").read_text()
    placement = "spannorm.placements.spannorm.SpanNorm"  # what has a dot is taken for code of somebody's own
    (own / "config.yaml").write_text(config.replace("placement: spannorm\n", f"placement: {placement}\n"))
    assert f"allow={placement} runs it" in refused(capsys, own, f"output={tmp_path / 'none'}")
    findings = found(str(own), "measures=lens", f"allow={placement}")
    assert set(findings) == {"lens"}
    beside = tmp_path / "beside"  # the second run's too
    anatomy.main([str(folder), str(own), "tokens=50", "measures=lens", f"allow={placement}", f"output={beside}"])


def test_differences_are_paired_document_by_document(report: Path) -> None:
    content = json.loads((report / "report.json").read_text())
    first, second = (run["findings"]["layer_drop"]["by_document"]["loss"][0] for run in content["runs"])
    tokens = np.array(content["text"]["tokens_by_document"])
    (label,) = content["differences"]["layer_drop"]
    difference = content["differences"]["layer_drop"][label]["loss"][0]
    assert difference["value"] == pytest.approx((sum(second) - sum(first)) / tokens.sum(), abs=1e-5)
    assert len(tokens) < FEWEST
    assert difference["low"] is difference["high"] is None
    text = (report / "report.md").read_text()
    assert "There are no intervals: bootstrap over documents takes at least 8" in text
    assert " to " not in text[text.index("## In numbers") : text.index("## layer drop")]


def test_runs_whose_folders_end_alike_keep_their_figures(runs: list[Path], tmp_path: Path) -> None:
    folders = [tmp_path / name / "x/seed0" for name in ("a", "b")]
    for link, folder in zip(folders, runs, strict=True):
        shutil.copytree(folder, link)
    output = tmp_path / "report"
    anatomy.main([*map(str, folders), "tokens=48", "measures=layer_drop", f"output={output}"])
    content = json.loads((output / "report.json").read_text())
    assert [run["label"] for run in content["runs"]] == ["a/x/seed0", "b/x/seed0"]
    assert set(content["differences"]["layer_drop"]) == {"b/x/seed0"}
    values = [run["findings"]["layer_drop"]["scalars"]["loss"] for run in content["runs"]]
    reported = content["intervals"]["layer_drop"]
    assert [reported[label]["loss"][0]["value"] for label in ("a/x/seed0", "b/x/seed0")] == pytest.approx(values)
    assert values[0] != values[1]


def test_tensorboard_has_curves_and_pictures(report: Path) -> None:
    def events(name: str) -> Any:
        accumulator = EventAccumulator(str(report / "tensorboard" / name), size_guidance={"scalars": 0, "images": 0})
        return accumulator.Reload()

    images = events("pictures")
    assert {"layer_drop/layer_drop", "similarity/cka"} <= set(images.Tags()["images"])
    assert images.Images("similarity/cka")[0].encoded_image_string[:4] == b"\x89PNG"
    content = json.loads((report / "report.json").read_text())
    label = content["runs"][0]["label"].replace("/", "_")
    drops = events(label).Scalars("layer_drop/drop_by_block")
    assert [event.step for event in drops] == [1, 2]
    expected = content["runs"][0]["findings"]["layer_drop"]["curves"]["drop_by_block"]["values"]
    assert [event.value for event in drops] == pytest.approx(expected, rel=1e-5)


def test_one_run_is_reported_in_its_folder_and_never_again(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    anatomy.main([str(runs[0]), "tokens=100", "measures=layer_drop,tuned_lens", "skip=identity"])
    folder = runs[0] / "anatomy/report"
    assert capsys.readouterr().out == f"Report: {folder}/report.md\n"
    content = json.loads((folder / "report.json").read_text())
    assert set(content["runs"][0]["findings"]) == {"layer_drop", "tuned_lens"}
    assert content["differences"] == {"layer_drop": {}, "tuned_lens": {}}
    assert content["runs"][0]["findings"]["layer_drop"]["notes"] == [
        "A block is left out as if it were not there, with its norms."
    ]
    assert refused(capsys, runs[0]) == (
        f"Error: output='{folder}' is not valid: expected a new folder: this one is there already"
    )


def test_an_imported_model_takes_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "theirs", "Llama", vocab_size=257)
    make_run(tmp_path / "theirs", tmp_path / "run")
    assert "an imported model has no data" in refused(capsys, tmp_path / "run")


def test_imported_models_are_compared_wherever_their_folders_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "theirs", "Llama", vocab_size=300)
    add_tokenizer(tmp_path / "theirs", 300)
    corpus = bpe_corpus(tmp_path / "bpe", tokenizer=str(tmp_path / "theirs"))
    monkeypatch.chdir(tmp_path)
    make_run(Path("theirs"), Path("one"))
    shutil.copytree("one", "elsewhere/other")
    shutil.move("one", "elsewhere/one")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    names = [f"../elsewhere/{name}" for name in ("one", "other")]
    anatomy.main([*names, f"data={corpus}", "tokens=50", "measures=lens", "output=report"])
    first, second = json.loads(Path("report/report.json").read_text())["runs"]
    assert first["findings"] == second["findings"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["measures=layer_dorp"],
            r"measures='layer_dorp' is not valid: expected one of .* \(did you mean layer_drop\?\)",
        ),
        (
            ["measures=cross_similarity"],
            "measures='cross_similarity' is not valid: expected one that measures a single",
        ),
        (["measures=lens,lens"], "measures='lens,lens' is not valid: expected each once"),
        (["tokens=0"], "tokens=0 is not valid: expected an integer >= 1"),
        (["batch_size=0"], "batch_size=0 is not valid: expected an integer >= 1"),
        (["skip=nothing"], "skip='nothing' is not valid: expected one of placement, identity"),
        (["data=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(
    runs: list[Path], arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report"
    assert re.search(message, refused(capsys, runs[1], f"output={output}", *arguments))
    assert not output.exists()


def test_what_would_be_refused_in_the_end_is_refused_before_anything_is_measured(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(LayerDrop, "__call__", measured)
    one = [runs[0], "measures=layer_drop,critical_batch_size", f"output={tmp_path / 'report'}"]
    assert refused(capsys, *one, "tokens=100") == (
        "Error: tokens=100 is not valid: expected more: critical_batch_size needs 32 samples for fitting, and there "
        "are 9"
    )
    second = shutil.copytree(runs[1], tmp_path / "second")
    two = [runs[0], runs[1], second, "measures=layer_drop,critical_batch_size", f"output={tmp_path / 'report'}"]
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("accumulate_grad_batches: 1", "accumulate_grad_batches: 16"))
    assert "needs 512 samples for fitting" in refused(capsys, *two, "tokens=4000")
    (second / "checkpoints/last.ckpt").write_bytes(b"broken")
    assert "a whole checkpoint; this file cannot be read as one" in refused(capsys, *two)
    (second / "checkpoints/last.ckpt").unlink()
    assert "last.ckpt is not there" in refused(capsys, *two)
    (tmp_path / "file").touch()
    for output in (tmp_path / "file/report", "/proc/nowhere/report", tmp_path / ("long" * 100)):
        assert re.match(r"Error: output=.* is not valid", refused(capsys, *one[:-1], f"output={output}"))
    assert not (tmp_path / "report").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"second", "file"}
    with pytest.raises(AssertionError, match="measured"):
        anatomy.main([str(runs[0]), "measures=layer_drop", f"output={tmp_path / 'new/report'}"])


def test_a_run_is_compared_with_others_only(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(runs[0])
    message = refused(capsys, *runs, tmp_path / "link", f"output={tmp_path / 'report'}")
    assert message == (
        f"Error: RUN='{runs[0]}' is not valid: expected one that is given once, or with another checkpoint"
    )


def test_two_checkpoints_of_a_run_stand_side_by_side(runs: list[Path], tmp_path: Path) -> None:
    """The earlier one is the last with other routers."""
    content = torch.load(runs[1] / "checkpoints/last.ckpt", weights_only=False)
    for name, weight in content["state_dict"].items():
        if "router" in name:
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    earlier = tmp_path / "earlier.ckpt"
    torch.save(content, earlier)
    output, alone = tmp_path / "report", tmp_path / "alone"
    arguments = ["tokens=64", "measures=layer_drop,routing_agreement"]
    anatomy.main([str(runs[1]), f"checkpoint={earlier},last", f"output={output}", *arguments])
    anatomy.main([str(runs[1]), f"checkpoint={earlier}", f"output={alone}", "tokens=64", "measures=layer_drop"])
    found = json.loads((output / "report.json").read_text())["runs"]
    experiment = runs[1].resolve().parent.name
    assert [run["label"] for run in found] == [f"{experiment} earlier.ckpt", f"{experiment} last.ckpt"]
    assert [Path(run["checkpoint"]) for run in found] == [earlier, runs[1] / "checkpoints/last.ckpt"]
    assert 0 < found[1]["findings"]["routing_agreement"]["scalars"]["routing_agreement"] < 1
    losses = [run["findings"]["layer_drop"]["scalars"]["loss"] for run in found]
    assert losses[0] != losses[1]
    (single,) = json.loads((alone / "report.json").read_text())["runs"]
    assert single["findings"]["layer_drop"]["scalars"]["loss"] == losses[0]


@pytest.mark.parametrize(
    ("number", "checkpoint", "message"),
    [
        (2, "{}/checkpoints/last.ckpt", "expected last or best, where one is for several runs"),
        (
            2,
            "last,best,last",
            "checkpoint='last,best,last' is not valid: expected last, best or a path: one, or one for each run",
        ),
        (1, "[]", "checkpoint='' is not valid: expected last, best or a path: one, or one for each run"),
        (1, "last,{}/checkpoints/last.ckpt", "expected one that is given once, or with another checkpoint"),
    ],
)
def test_a_checkpoint_is_one_run_s(
    runs: list[Path], number: int, checkpoint: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *runs[:number], f"checkpoint={checkpoint.format(runs[0])}")


def test_runs_of_other_tokens_are_not_compared(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = bpe_run(tmp_path, bpe_corpus(tmp_path / "bpe"))
    message = refused(capsys, runs[0], other, f"output={tmp_path / 'report'}")
    assert re.search(r"RUN=.* is not valid: expected a run whose tokens are those of .*, byte; this one has", message)
    output = tmp_path / "own"
    chosen = ["tokens=6000", "measures=layer_drop,lens"]
    anatomy.main([str(other), f"data={tmp_path / 'bpe/corpus'}", f"output={output}", *chosen])
    content = json.loads((output / "report.json").read_text())
    assert len(content["text"]["tokens_by_document"]) >= FEWEST
    (loss,) = content["intervals"]["layer_drop"][content["runs"][0]["label"]]["loss"]
    assert loss["low"] < loss["value"] < loss["high"]
    shown = f"{loss['value']:.4g} ({loss['low']:.4g} to {loss['high']:.4g})"
    assert shown in (output / "report.md").read_text()
    assert math.isfinite(content["runs"][0]["findings"]["lens"]["scalars"]["lens_effective_share"])


@pytest.mark.slow
def test_attention_crosses_documents_where_it_did_in_training(tmp_path: Path) -> None:
    """Whichever run comes first, the losses are those of each by itself."""
    corpus, folders = bpe_corpus(tmp_path / "bpe"), []
    for mask in ("true", "false"):
        (tmp_path / mask).mkdir()
        folders.append(bpe_run(tmp_path / mask, corpus, f"data.document_mask={mask}"))

    def report_of(*chosen: Path) -> tuple[dict[Path, float], str]:
        output = tmp_path / "_".join(folder.parent.name for folder in chosen) / "report"
        measures = ["layer_drop", *(["cross_similarity"] if len(chosen) > 1 else [])]
        anatomy.main([*map(str, chosen), "tokens=3000", f"measures={','.join(measures)}", f"output={output}"])
        found = json.loads((output / "report.json").read_text())["runs"]
        assert [run["document_mask"] for run in found] == [folder == folders[0] for folder in chosen]
        losses = [run["findings"]["layer_drop"]["scalars"]["loss"] for run in found]
        return dict(zip(chosen, losses, strict=True)), (output / "report.md").read_text()

    alone = report_of(folders[0])[0] | report_of(folders[1])[0]
    for order in (folders, folders[::-1]):
        losses, text = report_of(*order)
        assert losses == alone
        assert "Each run reads the text as it was trained: attention keeps documents apart" in text
        assert "Both read the text with data.document_mask as the first run was trained" in text


def test_what_was_kept_during_training_is_drawn(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As callbacks.monitors.anatomy keeps it, which its own tests have made by a run."""
    folder = runs[1] / "anatomy/steps"
    folder.mkdir(parents=True)
    for step in (0, 200, 1000):
        curve = {"values": [step / 1000, 0.0], "over": "block", "first": 1}
        found = {"scalars": {"loss": 5.0 - step / 500, "late_drop": None}, "curves": {"drop_by_block": curve}}
        content = {"step": step, "findings": {"layer_drop": {**found, "matrices": {}, "notes": []}}}
        (folder / f"{step}.json").write_text(json.dumps(content))
    kept = kept_of(runs[1])
    assert [part.step for part in kept] == [0, 200, 1000]
    assert [part.scalars()["loss"] for part in kept] == [5.0, 4.6, 3.0]
    output = tmp_path / "report"
    anatomy.main([str(runs[1]), "tokens=50", "measures=lens", f"output={output}"])
    assert "![scalars over steps](steps_scalars.png)" in (output / "report.md").read_text()
    assert (output / "steps_drops.png").stat().st_size > 1000
    (folder / "0.json").write_text('{"step": -1, "findings": {}}')
    assert "0.json cannot be read" in refused(capsys, runs[1], "tokens=50", f"output={tmp_path / 'again'}")


@pytest.mark.parametrize(
    ("scalars", "curves", "pictures"),
    [
        ({}, (None, None), []),
        ({"loss": 1.0}, (None, None), ["steps_scalars.png"]),
        ({}, ([1.0, 2.0], [0.5, None]), ["steps_drops.png"]),
    ],
)
def test_what_was_not_kept_is_not_drawn(
    scalars: dict[str, float], curves: tuple[list[float | None] | None, ...], pictures: list[str], tmp_path: Path
) -> None:
    """Files by hand: no scalars, or no losses without blocks."""
    (tmp_path / FOLDER).mkdir(parents=True)
    for step, values in enumerate(curves):
        kept = {} if values is None else {"drop_by_block": {"values": values}}
        found = {"layer_drop": {"scalars": scalars, "curves": kept}}
        (tmp_path / FOLDER / f"{step}.json").write_text(json.dumps({"step": step, "findings": found}))
    examined = Examined(tmp_path, tmp_path / "last.ckpt", 2, "prenorm", 2, 8, "dense", 100, False)
    output = tmp_path / "report"
    write(Report(make_text(), [examined], "somewhere", [kept_of(tmp_path)]), output)
    assert [path.name for path in output.glob("steps_*.png")] == pictures
    assert ("## Over training" in (output / "report.md").read_text()) is bool(pictures)


@pytest.mark.slow
def test_compare_shows_outcomes_of_the_same_text(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "curves.png"
    compare.main([*map(str, runs), "outcomes=late_drop,lens_overlap_depth", f"output={output}"])
    out = capsys.readouterr().out
    _, examined = examine(Chosen(tuple(runs), ("layer_drop",)))
    for found in examined:
        value = found.findings["layer_drop"].scalars["late_drop"]
        assert f"{value:,.4g}" in out[out.index("outcomes, measured on the same text") :]
    with pytest.raises(ConfigError, match=r"outcomes='late_dorp' is not valid: .*did you mean late_drop"):
        compare.main([*map(str, runs), "outcomes=late_dorp", f"output={output}"])
