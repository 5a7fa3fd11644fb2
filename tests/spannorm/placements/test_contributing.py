"""CONTRIBUTING.md is followed to the letter, in a copy of the tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.support.runs import ROOT, tiny_job

REGISTRY = "spannorm/placements/registry.py"
LEFT_OUT = {"data", "runs", "sweeps"}  # and what starts with a dot
# `python train.py`, except that compiling is left to the tracer: a C++ compiler may not be there, and takes its time.
TRAIN = (
    "import functools, runpy, sys; from torch import nn;"
    "nn.Module.compile = functools.partialmethod(nn.Module.compile, backend='eager', fullgraph=True);"
    "sys.argv[0] = 'train.py'; runpy.run_path('train.py', run_name='__main__')"
)


def call(tree: Path, *command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The project with the example of CONTRIBUTING.md added to it: one file, one import, one line."""
    for path in ROOT.iterdir():
        if path.name in LEFT_OUT or path.name.startswith("."):
            continue
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    section = (tmp_path / "CONTRIBUTING.md").read_text().split("## Add a placement")[1]
    file = re.search(r"`(spannorm/placements/\w+\.py)`:", section)
    source, registry = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert file is not None
    assert f"`{REGISTRY}`" in section
    assert len([line for line in (source + registry).splitlines() if line]) == 10
    (tmp_path / file[1]).write_text(source)
    statement, line = registry.strip("\n").split("\n\n")
    before, dictionary = (tmp_path / REGISTRY).read_text().split("\nPLACEMENTS: ")
    dictionary = dictionary.replace("\n}", f"\n{line}\n}}")
    (tmp_path / REGISTRY).write_text(f"{before}{statement}\n\nPLACEMENTS: {dictionary}")
    return tmp_path


@pytest.mark.slow
def test_the_example_trains_dense_and_moe_compiled_and_not(tree: Path) -> None:
    sweep = ("model=dense,moe", "model.compile=false,true")
    call(tree, "-c", TRAIN, "-m", *tiny_job("model.placement=halfnorm", "trainer.max_steps=2", *sweep))
    runs = [path.parent for path in tree.glob("runs/default/*/summary.json")]
    configs = [OmegaConf.load(run / "config.yaml").model for run in runs]
    assert {config.placement for config in configs} == {"halfnorm"}
    trained = sorted((config.ffn, config.compile) for config in configs)
    assert trained == [("dense", False), ("dense", True), ("moe", False), ("moe", True)]


@pytest.mark.slow
def test_the_example_breaks_no_test(tree: Path) -> None:
    files = ("tests/spannorm/placements", "tests/tools/test_signal.py", "tests/test_architecture.py")
    out = call(
        tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "halfnorm or table or docs or import", *files
    )
    assert " passed" in out
