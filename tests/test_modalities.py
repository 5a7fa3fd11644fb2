"""What was made for language works for images as it is: monitors, policies, tools; what is language's own says so."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from analysis.anatomy.held_out import held_out
from analysis.anatomy.layer_drop import LayerDrop
from core.errors import ConfigError
from core.open_run import open_run
from lightning_modules.vision_module import VisionModule
from studies.grid import Planned
from studies.record import FINISHED, Record, collect
from studies.run import with_outcomes
from tests.support.runs import events, load, scalars, tiny_job, train
from tests.support.tool_runs import byte_run
from tools import anatomy, compare, evaluate, generate, plan, propagation, replay
from tools.examination.examine import Chosen, examine

IMAGES = "experiment=vision_spannorm"

JOB = tiny_job(
    IMAGES,
    "model.ffn=moe",
    "model.placement=siamesenorm",
    "trainer.max_steps=3",
    "trainer.val_check_interval=2",
    "trainer.accumulate_grad_batches=2",
    "+callbacks=curvature",
    "callbacks.curvature.iterations=2",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture on digits, with every monitor on."""
    folder = tmp_path_factory.mktemp("images")
    finished = train(folder, *JOB, "run_dir=run")
    assert finished.code == 0, finished.err
    assert "Logistic regression on the pixels: 96.39% of the validation images" in finished.out
    assert "Accuracy " in finished.out
    return folder / "run"


def test_monitors_log_what_they_log_of_language(run: Path) -> None:
    tags = set(events(run).Tags()["scalars"])
    expected = {
        "train/loss",
        "val/loss",
        "val/accuracy",
        "val/calibration_error",
        "train/images",
        "train/images_per_second",
        "curvature/top_eigenvalue",
        "moe/max_load",
        *(f"signal/block_1/{figure}" for figure in ("variance", "attn_entropy", "attn_logit_max")),
        *(f"representation/block_2/{figure}" for figure in ("token_cosine", "effective_rank")),
        "gradients/block_1/attn_in",
        "updates/block_1/attn_in",
        "gradients/first_over_last",
    }
    assert expected <= tags
    assert not any(word in tag for tag in tags for word in ("theory", "perplexity", "tokens"))
    assert list(scalars(run, "train/images").values()) == [2 * 4 * step for step in (1, 2, 3)]
    entropies = scalars(run, "signal/block_1/attn_entropy").values()
    assert all(0.5 < entropy <= 1 + 1e-6 for entropy in entropies), "every query sees all keys"
    assert all(math.isfinite(value) for tag in tags for value in scalars(run, tag).values())


def test_the_summary_has_the_classes_frequencies_beside_the_loss(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["unigram_loss"] == pytest.approx(math.log(10), abs=0.05)
    assert summary["val_loss"] < 4
    assert (summary["loss_unit"], summary["main"], summary["images"]) == ("nats per image", "accuracy", 24)
    assert summary["figures"] == {
        name: pytest.approx(scalars(run, f"val/{name}")[2]) for name in ("accuracy", "calibration_error")
    }
    assert not any("tokens" in key for key in summary)


@pytest.mark.slow  # half a minute on one thread
def test_the_experiment_reads_digits(tmp_path: Path) -> None:
    finished = train(tmp_path, IMAGES, "run_dir=run", "callbacks.progress=null")
    assert finished.code == 0, finished.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["figures"]["accuracy"] > 0.97, "logistic regression on the pixels finds 96.39 %"
    assert summary["figures"]["calibration_error"] < 0.03
    said = next(line for line in finished.out.splitlines() if line.startswith("Accuracy "))
    assert f"{summary['figures']['accuracy']:.2%}" in said


def test_a_field_that_may_not_change_is_named_as_it_is_set(run: Path) -> None:
    for field, value in (("module.pool", "mean"), ("module.patch_size", "4"), ("data.image_size", "16")):
        finished = train(run.parent, *JOB, "run_dir=run", "ckpt_path=last", "trainer.max_steps=9", f"{field}={value}")
        assert finished.code == 2
        assert f"{field}=" in finished.err
        assert "as in the checkpoint that is resumed" in finished.err


def test_a_record_has_accuracy_and_unit(run: Path) -> None:
    record = collect(Planned("run", {}, 0, ()), run)
    assert (record.loss_unit, record.main, record.bigram_loss) == ("nats per image", "accuracy", None)
    last = {name: scalars(run, f"val/{name}")[2] for name in ("accuracy", "calibration_error")}
    assert record.figures == {name: pytest.approx(value, rel=1e-4) for name, value in last.items()}
    assert record.outcome("accuracy") == record.figures["accuracy"]
    record.save(run.parent / "record.json")
    assert Record.load(run.parent / "record.json") == record


def test_runs_of_images_are_compared_by_what_they_have(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare.main([str(run), f"output={run.parent / 'compare.png'}"])
    table = next(part for part in capsys.readouterr().out.split("┏") if "accuracy" in part)
    assert "calibration error" in table
    assert "tokens" not in table
    assert "bigram" not in table


def test_a_summary_of_masked_tokens_has_nothing_beside_it_that_predicts_the_next(tmp_path: Path) -> None:
    finished = train(tmp_path, *tiny_job("experiment=mlm_spannorm", "run_dir=run"))
    assert finished.code == 0, finished.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["unigram_loss"] is not None
    assert summary["bigram_loss"] is None
    assert summary["val_bits_per_byte"] is None


def test_a_run_of_images_is_opened_by_its_folder(run: Path) -> None:
    opened = open_run(run)
    assert isinstance(opened.module, VisionModule)
    batch = next(iter(opened.datamodule.val_dataloader()))
    with torch.no_grad():
        assert opened.module(batch["images"])[0].shape == (4, 10)


@pytest.mark.parametrize("experiment", ["vision_spannorm", "mlm_spannorm"])
def test_a_stopped_run_goes_on_bit_for_bit(experiment: str, tmp_path: Path) -> None:
    job = tiny_job(
        f"experiment={experiment}", "callbacks.last_checkpoint.every_n_train_steps=1", "optim.schedule=constant"
    )
    for name, steps in (("whole", (2,)), ("stopped", (1, 2))):
        for end in steps:
            resume = ["ckpt_path=last"] if end != steps[0] else []
            finished = train(tmp_path, *job, f"trainer.max_steps={end}", f"run_dir={name}", *resume)
            assert finished.code == 0, finished.err
    whole, stopped = (load(tmp_path / name / "checkpoints/last.ckpt")["state_dict"] for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(weight, stopped[name]) for name, weight in whole.items())


@pytest.mark.parametrize("policy", ["skip", "zclip", "adagc", "rollback", "stop"])
def test_every_policy_steers_a_run_of_images(policy: str, tmp_path: Path) -> None:
    job = tiny_job(IMAGES, f"callbacks.divergence.policy={policy}", "callbacks.last_checkpoint.every_n_train_steps=1")
    finished = train(tmp_path, *job, "run_dir=run")
    assert finished.code == 0, finished.err
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 2


def test_a_step_of_images_comes_out_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tiny_job(IMAGES, "trainer.max_steps=40", "trainer.val_check_interval=40", "callbacks.last_checkpoint=null")
    train(tmp_path, *job, "callbacks.divergence.loss_threshold=0.5", "optim.lr=0.3", "run_dir=run")
    assert list((tmp_path / "run/flight_recorder").iterdir()), "the loss has jumped"
    capsys.readouterr()
    replay.main([str(tmp_path / "run")])
    assert capsys.readouterr().out.endswith(": the same.\n")


@pytest.mark.parametrize(
    ("overrides", "positions"),
    [
        (["data=digits", "module.patch_size=2"], 17),
        (["data=shapes", "module.patch_size=8", "module.pool=mean"], 9),
        (["data=images", "data.path=nowhere", "data.image_size=12", "module.patch_size=4"], 10),
    ],
    ids=str,
)
def test_propagation_measures_the_model_for_the_data_that_are_configured(overrides: list[str], positions: int) -> None:
    """None of which are there: a rank cannot be above the number of positions, as many as in training."""
    rank = propagation.report([IMAGES, "model.num_layers=2", *overrides]).signals[0].effective_rank
    assert positions / 2 < rank <= positions


def test_propagation_measures_a_model_of_images(tmp_path: Path) -> None:
    result = propagation.report([IMAGES, "model.num_layers=3", "module.positions=rope"])
    assert result.predictions is None
    assert len(result.signals) == 3
    assert all(signal.variance > 0 and signal.hidden_gradient > 0 for signal in result.signals)
    assert result.signals[0].effective_rank > 8, "of 17 positions"


def test_a_plan_counts_images() -> None:
    config = plan.compose_config([IMAGES, "trainer.accelerator=cpu", "data.batch_size=6", "trainer.max_steps=10"])
    planned = plan.plan(config)
    assert planned.tokens == 10 * 6 * 17
    model: Any = OmegaConf.to_container(config.model)
    assert planned.parameters == VisionModule(model, {}, 8, 1, 10, patch_size=2).num_parameters[0]
    assert planned.peak > 0


def test_instruments_measure_images(run: Path, tmp_path: Path) -> None:
    """The loss is what the module logs of the same images; each image is a document."""
    report = tmp_path / "report"
    anatomy.main([str(run), "tokens=6120", f"output={report}", "measures=layer_drop,expert_share"])
    content = json.loads((report / "report.json").read_text())
    assert content["text"]["images"] == 360
    assert content["text"]["images_by_document"] == [1.0] * 360
    opened = open_run(run)
    numbers = np.arange(360)
    batch = {name: torch.from_numpy(rows) for name, rows in opened.datamodule.samples("val").read(numbers).items()}
    with torch.no_grad():
        loss = float(opened.module.compute_loss(batch)[0])
    found = content["runs"][0]["findings"]
    assert found["layer_drop"]["scalars"]["loss"] == pytest.approx(loss, rel=1e-4)
    text = (report / "report.md").read_text()
    assert "360 images (6,120 positions), of the validation split of " in text
    assert "Losses are in nats per image. In brackets: 95% intervals by bootstrap over images" in text
    assert found["expert_share"]["scalars"].keys() == {"busiest_expert"}


@pytest.mark.slow
def test_runs_of_images_stand_side_by_side_where_their_images_are_the_same(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With patches of another number too; never beside those of a text, or of images of another size."""
    small = [*tiny_job(IMAGES), "model.placement=spannorm"]
    for name, more in (("mean", ["module.pool=mean"]), ("larger", ["data.image_size=16"])):
        finished = train(tmp_path, *small, *more, f"run_dir={name}")
        assert finished.code == 0, finished.err
    text = byte_run(tmp_path)
    both = [str(run), str(tmp_path / "mean")]
    anatomy.main([*both, "tokens=300", "measures=outliers,cross_similarity", f"output={tmp_path / 'report'}"])
    content = json.loads((tmp_path / "report/report.json").read_text())
    for each, of_run in zip(content["intervals"]["outliers"].values(), content["runs"], strict=True):
        kurtosis = of_run["findings"]["outliers"]["scalars"]["kurtosis"]
        assert each["kurtosis"][0]["value"] == pytest.approx(kurtosis, rel=1e-4)
    ((_, difference),) = content["differences"]["outliers"].items()
    values = [of_run["findings"]["outliers"]["scalars"]["kurtosis"] for of_run in content["runs"]]
    assert difference["kurtosis"][0]["value"] == pytest.approx(values[1] - values[0], rel=1e-3)
    assert content["runs"][1]["left_out"] == {
        "cross_similarity": "it makes 16 positions of a sample, the first makes 17"
    }
    refusals = {
        (str(run), str(text)): r"predicts the class of an image, as that of .*; this one's predicts the next token of",
        (str(text), str(run)): r"predicts the next token of a text, as that of .*; this one's predicts the class of an",
        (str(run), str(tmp_path / "larger")): r"a run whose image_size are those of .*, 8; this one has 16",
        (str(run), "data=corpus"): r"data='corpus' is not valid: expected null: a prepared corpus is text, and",
    }
    for arguments, message in refusals.items():
        with pytest.raises(ConfigError, match=message):
            anatomy.main([*arguments, f"output={tmp_path / 'none'}"])


@pytest.mark.parametrize("experiment", ["vision_spannorm", "mlm_spannorm"])
def test_what_is_kept_of_images_and_of_filled_in_tokens_is_of_the_weights(experiment: str, tmp_path: Path) -> None:
    watched = ["+callbacks=anatomy", "callbacks.anatomy.every_n_steps=2", "callbacks.anatomy.tokens=200"]
    job = tiny_job(f"experiment={experiment}", "trainer.max_steps=3", *watched, "run_dir=run")
    finished = train(tmp_path, *job)
    assert finished.code == 0, finished.err
    folder = tmp_path / "run"
    assert {path.name for path in (folder / "anatomy/steps").iterdir()} == {"0.json", "2.json", "3.json"}
    kept = json.loads((folder / "anatomy/steps/3.json").read_text())["findings"]
    assert set(kept) == {"layer_drop", "contribution", "similarity", "lens"}
    opened = open_run(folder)
    opened.datamodule.prepare_data()
    found = LayerDrop()(opened.module.model, held_out(opened.datamodule, opened.module, 200))
    assert kept["layer_drop"]["scalars"]["loss"] == pytest.approx(found.scalars["loss"], rel=1e-3)
    assert scalars(folder, "anatomy/loss")[2] == pytest.approx(found.scalars["loss"], rel=1e-3)
    anatomy.main([str(folder), "tokens=200", f"output={tmp_path / 'report'}", "measures=layer_drop"])
    assert (tmp_path / "report/steps_drops.png").exists()


def test_masks_of_another_rate_ask_for_something_else(tmp_path: Path) -> None:
    for rate in (0.15, 0.5):
        finished = train(tmp_path, *tiny_job("experiment=mlm_spannorm"), f"module.mask_rate={rate}", f"run_dir={rate}")
        assert finished.code == 0, finished.err
    with pytest.raises(ConfigError, match=r"RUN=.*0\.5' is not valid: .*this one's they ask otherwise"):
        examine(Chosen((tmp_path / "0.15", tmp_path / "0.5"), ("layer_drop",)))


@pytest.mark.slow
def test_a_study_measures_outcomes_of_images(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = Planned("run", {}, 0, ())
    names = ("late_drop", "bf16_same", "kind_information")
    measured = with_outcomes(replace(collect(planned, run), status=FINISHED), run, names)
    assert capsys.readouterr().err == ""
    assert measured.outcomes.keys() == set(names)
    assert measured.outcomes["kind_information"] is None, "of what is no text"
    _, (found,) = examine(Chosen((run,), ("layer_drop",)))
    assert measured.outcomes["late_drop"] == pytest.approx(found.findings["layer_drop"].scalars["late_drop"], abs=1e-6)
    compare.main([str(run), "outcomes=late_drop", f"output={run.parent / 'outcomes.png'}"])
    assert f"{measured.outcomes['late_drop']:,.4g}" in capsys.readouterr().out


def test_what_needs_a_text_says_so(run: Path) -> None:
    valid = r"RUN=.* expected a run whose model predicts the next token"
    for main, arguments in ((generate.main, ["prompt=x"]), (evaluate.main, [])):
        with pytest.raises(ConfigError, match=valid):
            main([str(run), *arguments])


def test_language_and_images_are_not_mixed_up(tmp_path: Path) -> None:
    refused = train(tmp_path, *tiny_job("module=vision", "model.causal=false"))
    assert refused.code == 2
    assert "one that goes with the data: PythonStdlib has no image_size" in refused.err
    refused = train(tmp_path, "data=digits", "data.batch_size=4")
    assert refused.code == 2
    assert "one that goes with the data: Digits has no vocab_size" in refused.err
