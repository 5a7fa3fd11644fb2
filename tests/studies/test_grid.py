"""Every study's configuration at every scale, down to the model that each of its runs would build."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from core.build import build, import_target
from core.errors import ConfigError
from core.overrides import CONFIGS
from core.untrusted import Untrusted
from lightning_modules.composing import register_schemas
from studies.grid import Study, read
from studies.plan import planned

STUDIES = sorted(path.stem for path in (CONFIGS / "study").glob("*.yaml"))


def scales() -> list[Any]:
    """Return every study with every scale that it has; the large ones are slow to build, and one small one will do."""
    found = []
    for name in STUDIES:
        for scale in OmegaConf.load(CONFIGS / f"study/{name}.yaml").scales:
            quick = (name, scale) in (("main", "day"), ("placement_by_init", "laptop"))
            slow = [] if quick else [pytest.mark.slow]
            found.append(pytest.param(name, str(scale), marks=slow, id=f"{name}-{scale}"))
    return found


def study(name: str, scale: str) -> Study:
    """Return it with a rate of 1e-3 for each scheme, where another study is to select them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("studies.plan.selected_rates", lambda *_: [({}, 1e-3)])
        return planned([f"study={name}", f"scale={scale}"])[0]


@pytest.mark.parametrize(("name", "scale"), scales())
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
                kind: Any = import_target("module._target_", config.module["_target_"])
                module = build(config, "module", **kind.assumed(config.module))
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
        ({"seeds": [0, 0]}, "laptop", r"seeds=\[0, 0\] is not valid: expected each once"),
        ({"axes": {"optim.lr": [1e-3, 0.001]}, "baseline": None}, "laptop", "study.axes.optim.lr=.*each value once"),
        ({"axes": {"x": {"a b": [], "a-b": []}}, "baseline": None}, "laptop", "'a b and a-b'.*both would be a-b_seed0"),
        (
            {"overrides": "model=dense"},
            "laptop",
            "study.overrides='model=dense' is not valid: expected a list",
        ),
        ({"overrides": ["seed=3"]}, "laptop", "study.overrides='seed=3' is not valid: expected none that each run"),
        ({"axes": {"x": {"a": ["run_dir=x"]}}, "baseline": None}, "laptop", "study.axes.x='run_dir=x' is not valid"),
    ],
)
def test_mistakes_in_a_study_are_named(changes: dict[str, Any], scale: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read("mine", OmegaConf.create({**CONTENT, **changes}), scale)


RATES: dict[str, Any] = {
    "question": "Which?",
    "axes": {"model.placement": ["prenorm", "spannorm"], "optim": ["adamw", "muon"]},
    "seeds": [1],
    "rates_from": "rates",
    "rate_factors": [2, 0.5],
    "scales": {"laptop": {"needs": "little"}},
}


def selected(name: str) -> list[tuple[dict[str, str], float]]:
    """By placement and optimizer, and one that no axis has."""
    assert name == "rates"
    rates = {("prenorm", "adamw"): 1e-3, ("prenorm", "muon"): 1e-2, ("spannorm", "adamw"): 3e-3, ("x", "muon"): 1.0}
    found = [({"model.placement": one, "optim": other}, rate) for (one, other), rate in rates.items()]
    return [*found, ({"model.placement": "spannorm", "optim": "muon"}, 4e-2)]


def test_the_rates_that_another_study_has_selected_are_multiplied(tmp_path: Path) -> None:
    found = read("mine", OmegaConf.create(RATES), "laptop", rates_of=selected)
    rates = {run.name: run.overrides[-1] for run in found.runs()}
    assert rates == {
        "prenorm_adamw_2-x-best_seed1": "optim.lr=0.002",
        "prenorm_adamw_0.5-x-best_seed1": "optim.lr=0.0005",
        "prenorm_muon_2-x-best_seed1": "optim.lr=0.02",
        "prenorm_muon_0.5-x-best_seed1": "optim.lr=0.005",
        "spannorm_adamw_2-x-best_seed1": "optim.lr=0.006",
        "spannorm_adamw_0.5-x-best_seed1": "optim.lr=0.0015",
        "spannorm_muon_2-x-best_seed1": "optim.lr=0.08",
        "spannorm_muon_0.5-x-best_seed1": "optim.lr=0.02",
    }
    found.save(tmp_path / "study.yaml")
    assert Study.load(tmp_path / "study.yaml") == found
    text = (tmp_path / "study.yaml").read_text()
    (tmp_path / "study.yaml").write_text(text.replace("prenorm, muon", "prenorm, lion"))
    with pytest.raises(Untrusted, match="rates and rate_factors are not those of its axes"):
        Study.load(tmp_path / "study.yaml")


SELECTING: dict[str, Any] = {
    "question": "Which?",
    "axes": {"model.placement": ["prenorm", "spannorm", "postnorm"], "optim.lr": [1e-3, 3e-3]},
    "seeds": [1, 2],
    "select_seeds": [0],
    "select_overrides": ["trainer.max_steps=5"],
    "judge": ["prenorm", "spannorm"],
    "family": ["spannorm"],
    "baseline": "prenorm",
    "scales": {"laptop": {"needs": "little", "overrides": ["trainer.max_steps=50"]}},
}


def test_rates_are_selected_by_shorter_runs_and_only_some_schemes_judged() -> None:
    found = read("mine", OmegaConf.create(SELECTING), "laptop")
    assert [run.overrides[-1] for run in found.runs()] == ["trainer.max_steps=5"] * 6, (
        "behind the scale's, which it is for"
    )
    judged = found.runs_at([("prenorm", "0.001"), ("spannorm", "0.003"), ("postnorm", "0.003")])
    assert [run.name for run in judged] == [
        f"{name}_seed{seed}" for seed in (1, 2) for name in ("prenorm_0.001", "spannorm_0.003")
    ]
    assert not any("trainer.max_steps=5" in run.overrides for run in judged)


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (RATES, {"rates_from": None}, "study.rates_from=None is not valid: expected the name of the study"),
        (RATES, {"rate_factors": None}, r"study.rate_factors=None is not valid: expected a list of numbers > 0"),
        (RATES, {"rate_factors": [0]}, r"study.rate_factors=\[0\] is not valid"),
        (RATES, {"axes": {"optim.lr": [1.0]}}, "study.axes.optim.lr=.* is not valid: expected none beside study.rates"),
        (RATES, {"axes": {"model.placement": ["keel"]}}, "study.rates_from='rates' .* a rate for 'keel'"),
        (SELECTING, {"select_seeds": []}, "study.select_overrides=.* none without study.select_seeds"),
        (SELECTING, {"judge": ["spannorm"]}, "study.judge=.* the baseline's, 'prenorm'"),
        (SELECTING, {"judge": ["keel", "prenorm"]}, "study.judge='keel' is not valid"),
        (SELECTING, {"family": ["postnorm"]}, "study.family='postnorm' is not valid: .* that are judged"),
    ],
)
def test_mistakes_about_rates_are_named(content: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read("mine", OmegaConf.create({**content, **changes}), "laptop", rates_of=selected)
