"""Any configuration either trains or is refused with a line that names a field, before anything is written."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from spannorm import INITS, PLACEMENTS
from tests.support.runs import tiny_job, train

WORDS = ["abc", "''", "null", "true", "[]", "[1,2]", "{}", "{a: 1}", "nan", "inf", "-inf", "1e400", "-0.0", "'1 2'"]
COUNTS = ["-1", "0", "1", "2", "3", "7", "1.5", "1e3", *WORDS]
RATES = ["-1", "0", "0.5", "1", "2", "1e-30", "1e30", *WORDS]
WIDTHS = [*COUNTS, "8", "16", "64"]
SIZES = [*COUNTS, "100000000"]
OPTIONS = ["{alpha: 2}", "{ratio: 0.5}", "{factor: sublayers}", *WORDS]
SWITCHES = ["true", "false", "0", "2", *WORDS]

MODEL = {
    **dict.fromkeys(["dim", "num_heads", "num_kv_heads", "num_layers", "ffn_dim"], WIDTHS),
    **dict.fromkeys(["norm_eps", "rope_theta"], RATES),
    **dict.fromkeys(["tie_embeddings", "activation_checkpointing"], SWITCHES),
    "placement": [*PLACEMENTS, "none", *WORDS],
    "init": [*INITS, "default", *WORDS],
    "norm": ["rmsnorm", "layernorm", "dyt", "derf", "gatednorm", "none", *WORDS],
    "ffn": ["dense", "moe", *WORDS],
    "cpu_kernels": ["auto", "off", *WORDS],
    **dict.fromkeys(["placement_options", "init_options"], OPTIONS),
}
MOE = {
    **dict.fromkeys(["num_experts", "top_k", "expert_dim", "num_shared_experts", "shared_expert_dim"], COUNTS),
    **dict.fromkeys(["first_dense_layers", "layer_interval", "expert_parallel"], COUNTS),
    **dict.fromkeys(["jitter", "load_balancing_weight", "bias_update_rate", "z_loss_weight"], RATES),
    **dict.fromkeys(["shared_expert_weighted_sum", "normalize_weights"], SWITCHES),
    "backend": ["loop", "grouped", "megablocks", *WORDS],
    "score": ["softmax", "sigmoid", *WORDS],
    "balancing": ["loss", "bias", "none", *WORDS],
}
OPTIM = {
    **dict.fromkeys(["lr", "eps", "weight_decay", "min_lr_ratio", "decay_fraction"], RATES),
    **dict.fromkeys(["warmup_steps", "base_width", "base_ffn_width"], COUNTS),
    "betas": ["[0,0]", "[1,1]", "[0.9]", "[0.9,0.5]", "[nan,0.9]", "[-1,2]", *WORDS],
    "schedule": ["cosine", "wsd", "constant", *WORDS],
    "width_scaling": ["none", "mup", "standard", *WORDS],
    "depth_scaling": ["none", "completep", *WORDS],
}
DATA = {
    **dict.fromkeys(["seq_len", "batch_size", "val_batches", "seed"], SIZES),
    "num_workers": ["-1", "0", "1.5", *WORDS],
    "document_mask": SWITCHES,
}
TRAINER = {
    **dict.fromkeys(["max_epochs", "accumulate_grad_batches", "val_check_interval", "log_every_n_steps"], COUNTS),
    **dict.fromkeys(["limit_val_batches", "gradient_clip_val"], RATES),
    "devices": ["-2", "0", "1.5", *WORDS],
    "precision": ["bf16-mixed", "bf16-true", "16-mixed", "64-true", "32", *WORDS],
    "num_sanity_val_steps": ["-2", "0", "1", *WORDS],
    **dict.fromkeys(["enable_progress_bar", "enable_checkpointing", "benchmark", "deterministic"], SWITCHES),
}
CALLBACKS = {
    **dict.fromkeys(["signal_propagation.every_n_steps", "source_weights.every_n_steps"], COUNTS),
    **dict.fromkeys(["last_checkpoint.every_n_train_steps", "flight_recorder", "gradient_health"], COUNTS),
    "gradient_health.histogram_every_n_steps": COUNTS,
    "divergence.policy": ["warn", "skip", "zclip", "adagc", "rollback", "stop", *WORDS],
    "divergence.policy_options": ["{lr_factor: 0.3}", "{every: 0}", "{max_in_a_row: 1}", *WORDS],
    "best_checkpoint.monitor": ["train/loss", "val/lss", *WORDS],
    "best_checkpoint.mode": ["max", *WORDS],
    "best_checkpoint.save_top_k": ["-1", "0", "3", *WORDS],
    "throughput.peak_flops": RATES,
}
GROUPS = {"model": MODEL, "model.moe": MOE, "optim": OPTIM, "data": DATA, "trainer": TRAINER, "callbacks": CALLBACKS}
FIELDS = {f"{group}.{name}": values for group, fields in GROUPS.items() for name, values in fields.items()}
FIELDS["seed"] = COUNTS


@st.composite
def overrides(draw: Any) -> dict[str, str]:
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=4, unique=True))
    return {name: draw(st.sampled_from(FIELDS[name])) for name in names}


def names_one_of(given: dict[str, str], message: str) -> bool:
    """Whether a field that was set is named, dotted and whole: as the one that is wrong, or as what another one does
    not go with."""
    return any(re.search(rf"(?<![\w.]){re.escape(name)}(?![\w])", message) for name in given)


def assert_trains_or_is_refused(given: dict[str, str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="bad-config-"))
    try:
        arguments = [f"{name}={value}" for name, value in given.items()]
        finished = train(folder, *tiny_job("experiment=moe_spannorm", *arguments), "run_dir=run")
        if finished.code in (0, None):
            assert (folder / "run/summary.json").exists()
            return
        assert finished.code == 2, finished.err
        assert finished.err.startswith("Error: "), finished.err
        assert finished.err.count("\n") == 1, finished.err
        assert names_one_of(given, finished.err), f"{given}: {finished.err}"
        assert list(folder.iterdir()) == [], finished.err
    finally:
        shutil.rmtree(folder)


def sample(max_examples: int) -> settings:
    """The same ones each time; of four fields at most, there is nothing to shrink."""
    phases, unhurried = [Phase.generate], list(HealthCheck)
    return settings(
        max_examples=max_examples, derandomize=True, deadline=None, phases=phases, suppress_health_check=unhurried
    )


@sample(20)
@given(overrides())
def test_it_trains_or_is_refused(given: dict[str, str]) -> None:
    assert_trains_or_is_refused(given)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@sample(300)
@given(overrides())
def test_three_hundred_of_them(given: dict[str, str]) -> None:
    assert_trains_or_is_refused(given)
