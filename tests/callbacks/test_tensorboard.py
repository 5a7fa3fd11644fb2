"""What a run writes for TensorBoard, read back and computed again from the batches themselves."""

import math
from pathlib import Path

import pytest
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.support.job import ACCUMULATE, BATCH_SIZE, SEQ_LEN, STEPS, Job
from tests.support.recorder import Recorder
from tests.support.runs import EventAccumulator, events, run, scalars

EVERY_STEP = list(range(STEPS))
VALIDATED = [1, 3, 4]


@pytest.fixture(scope="module")
def written(job: Job) -> EventAccumulator:
    return events(job.folder)


def test_every_documented_scalar_is_there_at_its_steps(written: EventAccumulator) -> None:
    expected = {
        **dict.fromkeys(("train/loss", "train/tokens", "train/tokens_per_second"), EVERY_STEP),
        **dict.fromkeys(("moe/load_balancing_loss", "moe/z_loss", "moe/max_load"), EVERY_STEP),
        **dict.fromkeys(("optim/lr", "optim/grad_norm"), EVERY_STEP),
        **dict.fromkeys(("val/loss", "val/perplexity"), VALIDATED),
    }
    assert {tag: [event.step for event in written.Scalars(tag)] for tag in expected} == expected


def test_the_training_loss_is_the_mean_over_the_batches_of_a_step(job: Job) -> None:
    assert len(Recorder.losses) == STEPS * ACCUMULATE
    means = [sum(Recorder.losses[n : n + 2]) / 2 for n in range(0, STEPS * ACCUMULATE, 2)]
    assert list(scalars(job.folder, "train/loss").values()) == pytest.approx(means, rel=1e-5)


def test_the_gradient_norm_is_that_before_clipping(job: Job) -> None:
    assert min(Recorder.norms) > 0.1, "the job clips at 0.01"
    assert list(scalars(job.folder, "optim/grad_norm").values()) == pytest.approx(Recorder.norms, rel=1e-4)


def test_the_optimizer_gets_clipped_gradients(job: Job) -> None:
    assert Recorder.stepped == pytest.approx([0.01] * STEPS, rel=1e-3)


def test_tokens_are_counted_over_all_batches(job: Job) -> None:
    per_step = ACCUMULATE * BATCH_SIZE * SEQ_LEN
    assert list(scalars(job.folder, "train/tokens").values()) == [per_step * step for step in range(1, STEPS + 1)]
    assert min(scalars(job.folder, "train/tokens_per_second").values()) > 0


def test_the_learning_rate_is_that_of_the_step(job: Job) -> None:
    """Two steps of warm-up, then half a cosine over the three that are left, down to a tenth."""
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 3)) / 2 for step in range(3)]
    expected = [3e-3 * factor for factor in (0.5, 1.0, *cosine)]
    assert list(scalars(job.folder, "optim/lr").values()) == pytest.approx(expected, rel=1e-6)


def test_metrics_agree_with_each_other(job: Job) -> None:
    losses = scalars(job.folder, "val/loss")
    assert scalars(job.folder, "val/perplexity") == pytest.approx(
        {step: math.exp(x) for step, x in losses.items()}, rel=1e-5
    )
    assert all(1 <= load <= 4 for load in scalars(job.folder, "moe/max_load").values())  # 4 experts
    assert all(0.5 < balance < 2.5 for balance in scalars(job.folder, "moe/load_balancing_loss").values())


def test_hyperparameters_of_model_optimizer_and_data_are_there(written: EventAccumulator) -> None:
    content = written.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["model/dim"].number_value == 32
    assert settings["model/placement"].string_value == "spannorm"
    assert settings["model/moe/num_experts"].number_value == 4
    assert settings["optim/lr"].number_value == 3e-3
    assert settings["data/seq_len"].number_value == SEQ_LEN


def test_what_runs_are_compared_by_and_what_was_asked_for_come_first_where_names_are_sorted(tmp_path: Path) -> None:
    """As TensorBoard's tab does, whatever the order in the file."""
    folder = run(tmp_path, "run", "model.norm_eps=1e-6", "optim.betas=[0.8,0.9]", "+trainer.min_steps=1")
    content = events(folder).SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = HParamsPluginData.FromString(content).experiment
    names = sorted(info.name for info in experiment.hparam_infos)
    compared = ["1 placement", "2 init", "3 lr", "4 norm", "5 num_layers", "6 dim", "7 ffn", "8 optimizer"]
    assert names[: len(compared)] == compared, "the first five are shown, and of one run's names alone"
    asked = [name for name in names if name.startswith("asked/")]
    assert names[len(compared) : len(compared) + len(asked)] == asked
    assert {"asked/model/norm_eps", "asked/optim/betas", "asked/trainer/min_steps", "asked/data/seq_len"} <= set(asked)
    assert "asked/run_dir" not in asked
    assert {"model/norm_eps", "optim/betas", "model/placement", "provenance/commit"} <= set(names)
    assert [info.name.tag for info in experiment.metric_infos] == ["val/loss", "train/loss", "train/tokens_per_second"]
    content = events(folder).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert [settings[name].string_value for name in compared[:2]] == ["spannorm", "default"]
    assert [settings[name].number_value for name in ("3 lr", "5 num_layers")] == [3e-3, 2]
    assert settings["asked/model/norm_eps"].number_value == 1e-6
    assert settings["asked/trainer/min_steps"].number_value == 1


def test_a_sample_of_text_is_there(written: EventAccumulator) -> None:
    (event,) = written.Tensors("sample/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text.startswith("    def ")
    assert len(text) >= len("    def ") + 16
    assert event.step == STEPS
