"""Every shipped config composes, names things that exist, and trains."""

import inspect
import json
import pydoc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from tests.support.composing import composed
from tests.support.runs import ROOT, run, scalars

CHOICES = [path.relative_to(ROOT / "configs").with_suffix("") for path in sorted((ROOT / "configs").glob("*/*.yaml"))]
CHOICES = [choice for choice in CHOICES if choice.parent.name != "study"]  # of other commands
FILLED_IN = {"trainer": {"callbacks", "logger", "default_root_dir"}}
ON_A_CPU = ["trainer.accelerator=cpu", "model.compile=false"]
ON_SHARDS = ("experiment=dense_7b", "study_scale=gpu", "study_scale=paper")
JOBS = [f"{choice.parent}={choice.stem}" for choice in CHOICES if str(choice.parent) in ("experiment", "study_scale")]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_shipped_file_composes_and_fits_what_it_configures(choice: Path) -> None:
    config = composed(f"{choice.parent}={choice.stem}")
    assert OmegaConf.missing_keys(config) == set()
    OmegaConf.resolve(config)
    targets = dict(find_targets(config))
    assert {"module", "data", "trainer"} <= targets.keys()
    for where, node in targets.items():
        if node["_target_"] is None:  # data=own, whose class is the user's
            continue
        target = pydoc.locate(node.pop("_target_"))
        assert callable(target), where
        filled_in = dict.fromkeys([*FILLED_IN.get(where, ()), *getattr(target, "of_data", ())])
        inspect.signature(target).bind(**{**filled_in, **node})


CLUSTERS = ["trainer=auto", "trainer=ddp", "trainer=fsdp", "trainer=slurm", "experiment=dense_7b"]


@pytest.mark.parametrize("choice", CLUSTERS)
@pytest.mark.parametrize(
    ("accelerator", "has_gpu", "expected"),
    [
        ("gpu", False, ("bf16-mixed", True)),
        ("cuda", False, ("bf16-mixed", True)),
        ("auto", True, ("bf16-mixed", True)),
        ("auto", False, ("32-true", False)),
        ("cpu", True, ("32-true", False)),
    ],
)
def test_on_gpus_they_train_in_bf16_and_compiled(
    choice: str, accelerator: str, has_gpu: bool, expected: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    config = composed(choice, f"trainer.accelerator={accelerator}")
    assert (config.trainer.precision, config.model.compile) == expected
    config = composed(choice, f"trainer.accelerator={accelerator}", "trainer.precision=16-mixed", "model.compile=true")
    assert (config.trainer.precision, config.model.compile) == ("16-mixed", True)


def find_targets(node: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted name, the node) of everything with a `_target_`."""
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        yield where, {str(key): value for key, value in node.items()}
    for key, child in node.items():
        yield from find_targets(child, f"{where}.{key}".lstrip("."))


@pytest.mark.parametrize("job", [None, *JOBS])
def test_every_job_trains(job: str | None, tmp_path: Path) -> None:
    chosen = [job, *ON_A_CPU] if job else []
    if job in ON_SHARDS:  # which are not here
        chosen += ["data=python_stdlib", "~data.path", "micro_batch_size=null"]
    if job == "study_scale=day":  # whose corpus takes minutes, and whose schedule more than two steps
        chosen += ["data=python_stdlib", "optim.schedule=cosine"]
    folder = run(tmp_path, "run", *chosen)
    losses = scalars(folder, "train/loss")
    assert list(losses) == [0, 1]
    least, most = (1, 4) if job == "experiment=vision_spannorm" else (3, 8)  # ln 10 = 2.3, ln 257 = 5.5
    assert all(least < loss < most for loss in losses.values())
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2
    asked, ran = composed(*chosen[:1]), OmegaConf.load(folder / "config.yaml")
    assert ran.trainer.precision == asked.trainer.precision
    assert ran.trainer.gradient_clip_val == asked.trainer.gradient_clip_val == 1.0
    asked, ran = asked.model, ran.model
    assert (ran.ffn, ran.placement, ran.init, ran.norm) == (asked.ffn, asked.placement, asked.init, asked.norm)


def test_every_argument_of_a_callback_is_a_field_of_the_configuration() -> None:
    """So that callbacks.NAME.FIELD=VALUE works for each; Lightning's own have too many."""
    for name, node in composed().callbacks.items():
        target = pydoc.locate(node["_target_"])
        assert inspect.isclass(target)
        if getattr(target.__init__, "__module__", target.__module__).startswith("callbacks."):
            arguments = set(inspect.signature(target).parameters)
            assert set(node) - {"_target_"} == arguments, name
