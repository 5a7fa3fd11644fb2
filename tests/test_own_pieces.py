"""docs/own_pieces.md, all of it in one run, from a folder outside of the checkout, as a user has it: in processes."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core.errors import InvalidValue
from core.event_files import event_files
from lightning_modules.language_module import LanguageModule
from tests.support.own_pieces import forget_pieces, page, pieces, write_pieces
from tests.support.runs import ROOT, Finished, scalars, tiny_job, train
from tools import evaluate, generate

OWN = [
    "model.placement=my_placement.HalfNorm",
    "model.norm=my_norm.ScaleOnly",
    "model.norm_options={start: 0.5}",
    "model.init=my_init.small",
    "optim.optimizer=my_optimizer.Signs",
    "optim.schedule=my_schedule.staircase",
    "+callbacks.mine._target_=my_monitor.Loudest",
    "data=own",
    "data._target_=my_data.Counting",
    "+data.size=20",
]
STEPS = ["trainer.max_steps=8", "callbacks.last_checkpoint.every_n_train_steps=4", "optim.lr=1e-3"]
JOB = [*(a for a in tiny_job(*STEPS) if not a.startswith("data.root")), *OWN]
NAMES = [word.partition("=")[2] for word in OWN if "=my_" in word]


def python(folder: Path, *command: str, **variables: str) -> Finished:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    ended = subprocess.run([sys.executable, *command], cwd=folder, env=environment, text=True, capture_output=True)
    return Finished(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, in which a process of its own has trained 8 steps, and saved the 4th beside the last."""
    folder = tmp_path_factory.mktemp("home")
    assert not folder.is_relative_to(ROOT)
    write_pieces(folder)
    ended = python(folder, str(ROOT / "train.py"), *JOB, "run_dir=whole")
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    forget_pieces()
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(home)
    yield home
    forget_pieces()


def test_there_are_seven_of_twenty_lines_or_so() -> None:
    names = ("placement", "norm", "init", "optimizer", "schedule", "monitor", "data")
    assert set(pieces()) == {f"my_{name}.py" for name in names}
    assert all(len(text.splitlines()) < 40 for text in pieces().values())
    assert len(NAMES) == 7


def test_each_is_what_the_run_is_made_of(home: Path) -> None:
    """By figures that the file gives, and no piece of ours."""
    saved = torch.load(home / "whole/checkpoints/last.ckpt", weights_only=True)
    weights = saved["state_dict"]
    assert not [name for name in weights if name.endswith("norm_ffn.gain")], "a norm of ours"
    drawn = weights["model.blocks.0.attn.o_proj.weight"]
    assert 0.003 < drawn.std() < 0.008, "my_init.small has 0.01 / 2 blocks, and 8 steps move them by 1e-3 at most"
    assert weights["model.head.weight"].shape[0] == 20, "data.size is the vocabulary"
    assert {name for kept in saved["optimizer_states"][0]["state"].values() for name in kept} == {"mean"}
    rates = list(scalars(home / "whole", "optim/lr").values())
    # Two steps of warm-up, then halved at each quarter of 8 steps, down to a tenth.
    assert rates == pytest.approx([5e-4, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4, 1.25e-4, 1.25e-4])
    assert saved["Counting"]["stream_identity"]["size"] == 20
    for n in (1, 2):
        assert len(scalars(home / "whole", f"gradients/block_{n}/all")) == 8
    loudest = scalars(home / "whole", "mine/loudest_block")
    for step, block in loudest.items():
        norms = {n: scalars(home / "whole", f"gradients/block_{n}/all")[step] for n in (1, 2)}
        assert block == max(norms, key=norms.__getitem__)
    assert len(loudest) == 8


def test_what_travelled_with_the_transfer_is_the_heads_largest_weight(home: Path) -> None:
    """As it was before the step: Signs moves every entry by the rate, after the decay."""
    largest = list(scalars(home / "whole", "mine/largest").values())
    rates = list(scalars(home / "whole", "optim/lr").values())
    assert len(set(largest)) == 8
    for before, after, rate in zip(largest, largest[1:], rates, strict=False):
        assert abs(after - before) <= rate * (1 + 0.1 * before) + 1e-7


def test_it_is_resumed_bit_for_bit(at_home: Path) -> None:
    whole = torch.load("whole/checkpoints/last.ckpt", weights_only=True)
    shutil.copytree("whole", "part")
    for path in event_files(Path("part")):
        path.unlink()
    resumed = train(at_home, *JOB, "run_dir=part", "ckpt_path=part/checkpoints/previous.ckpt")
    assert resumed.code == 0, resumed.err
    part = torch.load("part/checkpoints/last.ckpt", weights_only=True)
    assert all(torch.equal(whole["state_dict"][name], part["state_dict"][name]) for name in whole["state_dict"])
    for tag in ("train/loss", "optim/lr", "mine/largest"):
        assert list(scalars(at_home / "part", tag)) == [4, 5, 6, 7]
        assert scalars(at_home / "part", tag).items() <= scalars(at_home / "whole", tag).items()


def test_tools_open_it_by_name_alone(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidValue, match="the saved configuration names code that is not this project's") as refused:
        evaluate.main(["whole"])
    assert not any(name.removesuffix(".py") in sys.modules for name in pieces()), "nothing of it is imported"
    offered = str(refused.value).rpartition("allow=")[2].split()[0]
    assert set(offered.split(",")) == set(NAMES), "the line says all that it takes"
    opened = python(at_home, "-m", "tools.evaluate", "whole", f"allow={offered}", PYTHONPATH=str(ROOT))
    assert opened.code == 0, opened.err
    assert (at_home / "whole/evaluation").is_dir()
    generate.main(["whole", "prompt=1 2 3", "num_tokens=4", f"allow={offered}"])
    assert capsys.readouterr().out.startswith("1 2 3 ")
    loaded = LanguageModule.load_from_checkpoint("whole", allow=offered.split(","))
    assert type(loaded.model.blocks[0].placement).__name__ == "HalfNorm"


def test_data_that_keep_no_position_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "my_plain.py").write_text("import lightning as L\n\n\nclass Plain(L.LightningDataModule):\n    pass\n")
    bare = [f"~data.{name}" for name in ("seq_len", "batch_size", "val_batches", "num_workers", "seed")]
    refused = train(tmp_path, "data=own", "data._target_=my_plain.Plain", *bare, "run_dir=run")
    assert refused.code == 2
    assert "data._target_='my_plain.Plain' is not valid: expected a subclass of datamodules.endless_" in refused.err
    assert refused.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    sys.modules.pop("my_plain")


def test_a_group_without_its_class_says_so(tmp_path: Path) -> None:
    refused = train(tmp_path, "data=own", "run_dir=run")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert refused.err.startswith("Error: data._target_=None is not valid: expected a class that can be imported")


def test_a_resumed_run_keeps_the_datas_own_fields(at_home: Path) -> None:
    job = [argument.replace("size=20", "size=21") for argument in JOB]
    refused = train(at_home, *job, "trainer.max_steps=9", "run_dir=whole", "ckpt_path=last")
    assert refused.code == 2
    assert "=21 is not valid: expected 20, as in the checkpoint that is resumed" in refused.err


def test_the_protocols_are_all_on_the_page() -> None:
    section = page("own_pieces").partition("### What callbacks ask of each other")[2].partition("\n## ")[0]
    for file in ("callbacks/protocols.py", "core/run_control.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        assert f"`{method.name}" in section, method.name
