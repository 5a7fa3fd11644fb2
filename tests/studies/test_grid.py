"""Every study's configuration at every scale, down to the model that each of its runs would build."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from core.build import build
from core.errors import ConfigError
from core.overrides import CONFIGS
from lightning_modules.composing import register_schemas
from studies.grid import Study, read
from studies.run import planned

STUDIES = sorted(path.stem for path in (CONFIGS / "study").glob("*.yaml"))
SCALES = ("laptop", pytest.param("gpu", marks=pytest.mark.slow), pytest.param("paper", marks=pytest.mark.slow))


def study(name: str, scale: str) -> Study:
    return planned([f"study={name}", f"scale={scale}"])[0]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_every_study_can_be_built(name: str, scale: str) -> None:
    """On the meta device, which holds no numbers: every label of every axis, with the others at their first."""
    asked, sizes = study(name, scale), {}
    register_schemas()
    assert asked.question.endswith("?")
    assert asked.needs
    first = asked.runs()[0]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for run in asked.runs():
            changed = [axis for axis in asked.axes if run.point[axis] != first.point[axis]]
            if run.seed != first.seed or len(changed) > 1:
                continue
            config = compose("train", [*run.overrides, f"seed={run.seed}", "run_dir='runs/x'"])
            config.model.compile = False  # of which nothing is seen before it runs
            with torch.device("meta"):
                module = build(config, "module", vocab_size=256)
                module.configure_model()
            sizes[tuple(run.point.values())] = module.num_parameters[0]
    if name == "depth":
        for point, size in sizes.items():  # embeddings of another vocabulary change the sum at the other scales
            assert size == pytest.approx(next(iter(sizes.values())), rel=0.03 if scale == "laptop" else 0.06), point


def test_the_laptop_scale_is_as_large_as_the_documentation_says() -> None:
    def sizes(name: str) -> tuple[int, ...]:
        asked = study(name, "laptop")
        return (*(len(points) for points in asked.axes.values()), len(asked.seeds))

    assert sizes("placement_by_init") >= (6, 3, 3)
    assert sizes("learning_rate") >= (6, 4, 2)
    assert len(study("depth", "laptop").axes["depth"]) >= 4
    assert list(study("depth", "laptop").axes["depth"])[-1] == "64"


CONTENT: dict[str, Any] = {
    "question": "Which?",
    "axes": {
        "model.norm": ["rmsnorm", None],
        "size": {"small, or so": ["model.dim=8", "model.num_heads=1"], "large": "model.dim=64"},
    },
    "seeds": [0, 1],
    "baseline": "rmsnorm",
    "overrides": ["model=dense"],
    "scales": {"laptop": {"needs": "little", "overrides": ["data=synthetic"]}, "gpu": {"needs": "much", "seeds": [7]}},
}


def test_the_grid_is_the_product_of_axes_and_seeds_seed_by_seed() -> None:
    found = read("mine", OmegaConf.create(CONTENT), "laptop")
    runs = found.runs()
    assert [run.name for run in runs[:4]] == [
        f"{norm}_{size}_seed0" for norm in ("rmsnorm", "null") for size in ("small-or-so", "large")
    ]
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4
    assert runs[2].overrides == ("model=dense", "data=synthetic", "model.norm=null", "model.dim=8", "model.num_heads=1")
    assert runs[2].point == {"model.norm": "null", "size": "small, or so"}
    assert [run.seed for run in read("mine", OmegaConf.create(CONTENT), "gpu").runs()] == [7] * 4
    assert [run.seed for run in read("mine", OmegaConf.create(CONTENT), "gpu", [3]).runs()] == [3] * 4


def test_a_saved_study_is_read_again(tmp_path: Path) -> None:
    found = read("mine", OmegaConf.create(CONTENT), "laptop")
    found.save(tmp_path / "study.yaml")
    assert Study.load(tmp_path / "study.yaml") == found


@pytest.mark.parametrize(
    ("changes", "scale", "message"),
    [
        ({}, "laptob", "scale='laptob' is not valid: .*did you mean laptop?"),
        ({"seeds": [0.5]}, "laptop", "seeds=.* is not valid: expected a list of integers >= 0"),
        ({"baseline": "rmsnrm"}, "laptop", "study.baseline='rmsnrm' is not valid: .*did you mean rmsnorm?"),
        ({"axes": {"model.norm": "rmsnorm"}}, "laptop", "study.axes.model.norm='rmsnorm' is not valid"),
        ({"axis": {}}, "laptop", "study='axis' is not valid: .*did you mean axes?"),
        ({"scales": None}, "laptop", "study.scales=None is not valid"),
    ],
)
def test_mistakes_in_a_study_are_named(changes: dict[str, Any], scale: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read("mine", OmegaConf.create({**CONTENT, **changes}), scale)
