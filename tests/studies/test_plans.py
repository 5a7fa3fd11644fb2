"""What the runs of every study will take at the scales that need GPUs, held against what the study says it needs."""

import re

import pytest
import yaml

from core.overrides import CONFIGS
from studies.grid import Planned, Study
from studies.plan import planned
from tools.plan import GIB, USABLE, compose_config, plan

STUDIES = sorted(path.stem for path in (CONFIGS / "study").glob("*.yaml"))
ROOM = USABLE * 80e9 / GIB
"""GiB of a GPU of 80 GB."""
VOCABULARY = 32768
WITHOUT_EFFECT = {"optim.lr", "model.init", "init", "width_scaling"}
"""Axes that change no size."""


def study(name: str, scale: str) -> Study:
    file = yaml.safe_load((CONFIGS / "study" / f"{name}.yaml").read_text())
    if scale not in file["scales"]:
        pytest.skip(f"{name} has no such scale")
    of_another = ["~study.rates_from", "~study.rate_factors"]  # which need not have been run
    return planned([f"study={name}", f"scale={scale}", *(of_another if "rates_from" in file else [])]).study


def check(asked: Study, run: Planned) -> None:
    config = compose_config(run.overrides)
    found, devices = plan(config, VOCABULARY), config.trainer.devices * config.trainer.get("num_nodes", 1)
    assert found.memory / GIB < ROOM, f"{run.name}: {found.memory / GIB:.0f} GiB"
    number, size = re.match(r"(\w+) GPUs? of (\d+) GB", asked.needs).groups()  # type: ignore[union-attr]
    assert ({"one": 1}.get(number) or int(number), int(size)) == (devices, 80)
    assert found.precision == "bf16-mixed"
    assert found.compiled


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scale", ["gpu", "paper"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_run_fits(name: str, scale: str) -> None:
    asked, seen = study(name, scale), set()
    for run in asked.runs():
        size = tuple(label for axis, label in run.point.items() if axis not in WITHOUT_EFFECT)
        if size not in seen:
            seen.add(size)
            check(asked, run)


@pytest.mark.parametrize(
    ("name", "scale", "point"),
    [("muon", "gpu", {"model.placement": "gr"}), ("width_transfer", "paper", {"width": "4096"})],
)
def test_so_do_the_largest(name: str, scale: str, point: dict[str, str]) -> None:
    asked = study(name, scale)
    check(asked, next(run for run in asked.runs() if point.items() <= run.point.items()))
