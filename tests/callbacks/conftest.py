"""One tiny job with everything on, whose traces the tests look at."""

import pytest

from tests.support.job import ACCUMULATE, STEPS, Job
from tests.support.runs import tiny_job, train


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """5 steps of 2 batches each, every one logged; validated after step 2, 4 and 5; clipped hard."""
    cwd = tmp_path_factory.mktemp("job")
    overrides = [
        f"trainer.max_steps={STEPS}",
        f"trainer.accumulate_grad_batches={ACCUMULATE}",
        "trainer.val_check_interval=4",
        "trainer.gradient_clip_val=0.01",
        "model.moe.load_balancing_weight=0",
        "model.moe.z_loss_weight=0",
        "callbacks.text_sample={_target_: callbacks.console.text_sample.TextSample, prompt: 'def ', num_tokens: 16}",
        "callbacks.progress.line_seconds=0",
        "+callbacks.recorder._target_=tests.support.recorder.Recorder",
        "run_dir=run",
    ]
    finished = train(cwd, *tiny_job("experiment=moe_spannorm", *overrides))
    assert finished.code == 0, finished.err
    return Job(finished, cwd / "run")
