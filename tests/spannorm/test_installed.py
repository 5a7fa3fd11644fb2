"""`pip install .` gives the library and nothing else: built, installed and used where there is torch and no more."""

import re
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import spannorm
from spannorm.norms import NormFactory
from tests.support.runs import ROOT

EXAMPLE = ROOT / "examples/own_model.py"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install .` puts into an environment, from a copy of the checkout's packages."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in ("spannorm", "core", "callbacks", "tools", "lightning_modules"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    offline = ["--no-index", "--no-build-isolation", "--no-deps", "--no-compile", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to torch and what torch itself requires, as an environment that has no more than that."""
    folder, waiting, seen = tmp_path_factory.mktemp("torch"), ["torch"], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()}:
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return folder


def python(code: str, *path: Path) -> str:
    """What a Python prints that sees its standard library, and these folders alone."""
    setup = f"import sys\nsys.path += {[str(folder) for folder in path]}\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", setup + code], cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_installs_one_package(installed: Path, tmp_path: Path) -> None:
    assert {path.name for path in installed.iterdir()} == {"spannorm", "spannorm-0.1.0.dist-info"}
    assert (installed / "spannorm/py.typed").is_file()
    assert {path.relative_to(installed) for path in installed.glob("spannorm/**/*.py")} == {
        path.relative_to(ROOT) for path in ROOT.glob("spannorm/**/*.py")
    }
    described = (installed / "spannorm-0.1.0.dist-info/METADATA").read_text()
    assert re.findall(r"^Requires-Dist: (\w+)", described, re.MULTILINE) == ["torch"]
    packed = shutil.make_archive(str(tmp_path / "wheel"), "zip", installed)  # as a wheel is
    assert Path(packed).stat().st_size < 100_000


def test_a_strangers_model_trains_with_torch_and_the_wheel_alone(installed: Path, torch_alone: Path) -> None:
    code = f"""
import importlib.util, runpy
others = ("lightning", "omegaconf", "hydra", "numpy", "rich", "core", "callbacks", "tools", "lightning_modules")
assert [name for name in others if importlib.util.find_spec(name)] == []
losses = runpy.run_path({str(EXAMPLE)!r})["train"](steps=25)
import spannorm
print(spannorm.__file__, losses[0], losses[-1])
"""
    where, first, last = python(code, torch_alone, installed).split()
    assert Path(where) == installed / "spannorm/__init__.py"
    assert float(first) > 3  # ln 32 is 3.47
    assert float(last) < 0.3


@pytest.mark.parametrize("name", spannorm.PLACEMENTS)
def test_the_example_goes_with_every_placement_and_norm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    placement = spannorm.PLACEMENTS[name]
    monkeypatch.setattr(spannorm, "SpanNorm", placement)
    for norm in placement.norms:
        monkeypatch.setattr(spannorm, "NormFactory", lambda kind, dim, norm=norm: NormFactory(norm, dim))
        model = runpy.run_path(str(EXAMPLE))["Model"](vocab_size=8, dim=32, layers=3)
        logits = model(torch.randint(8, (2, 5)))
        assert logits.shape == (2, 5, 8)
        logits.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients), norm


def test_the_readme_shows_that_model() -> None:
    section = (ROOT / "README.md").read_text().split("## Use it in your own model")[1]
    code = section.split("```python\n")[1].split("```")[0]
    imports, _, classes = code.partition("\n\n\n")
    assert classes.rstrip() in EXAMPLE.read_text()
    assert set(imports.splitlines()) <= set(EXAMPLE.read_text().splitlines())
    assert (ROOT / "README.md").read_text().index(code) < 4000, "on its first screen"
