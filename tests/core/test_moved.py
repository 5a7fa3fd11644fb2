"""What names a module by where it once was is understood: saved runs without a word, a command line with a line."""

import pydoc
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core.build import build
from core.errors import ConfigError
from core.moved import MOVED, RENAMED_FIELDS, current_name, override_with_current_names, with_current_names
from core.open_run import open_run
from core.overrides import with_names_of_today
from core.run_folder import resume_command
from core.saved_config import load_config
from lightning_modules.config import ModelConfig, OptimConfig, parse
from tests.support.composing import composed
from tests.support.runs import ROOT, load, run, tiny_job, train
from tools import replay

OLD = ROOT / "tests/fixtures/checkpoints/one_file/config.yaml"
CURVATURE = ("callbacks.curvature.Curvature", "callbacks.monitors.curvature.Curvature")


def test_every_module_is_where_the_table_says() -> None:
    for old, new in MOVED.items():
        assert (ROOT / f"{new.replace('.', '/')}.py").is_file(), new
        assert not (ROOT / f"{old.replace('.', '/')}.py").exists(), old


def test_every_callback_of_a_run_saved_before_is_found() -> None:
    nodes = OmegaConf.load(OLD).callbacks
    found = {name: pydoc.locate(current_name(node["_target_"])) for name, node in nodes.items() if node is not None}
    assert len(found) > 10
    for name, kind in found.items():
        assert kind is not None, name
        assert f"{kind.__module__}.{kind.__qualname__}" == current_name(nodes[name]["_target_"])


def test_what_a_checkpoint_keeps_of_a_callback_goes_by_a_name_that_has_not_changed() -> None:
    saved = load(OLD.parent / "checkpoints/last.ckpt")["callbacks"].keys()
    classes = {
        build(composed("run_dir=run"), f"callbacks.{name}").state_key
        for name in ("throughput", "random_state", "divergence")
    }
    assert classes == {"Throughput", "RandomState", "Divergence"}
    assert classes <= saved


def test_names_of_today_and_of_others_stay() -> None:
    for name in (
        CURVATURE[1],
        "callbacks.divergence.divergence.Divergence",
        "lightning.Trainer",
        "mine.Mine",
        "mine",
        "",
    ):
        assert current_name(name) == name


def test_names_are_replaced_at_any_depth_and_nowhere_else() -> None:
    old, new = CURVATURE
    node = {
        "_target_": old,
        "text": old,
        "parts": [{"deeper": {"_target_": old, "n": 1}}, None],
        "odd": {"_target_": 5},
    }
    expected = {"_target_": new, "text": old, "parts": [{"deeper": {"_target_": new, "n": 1}}, None]}
    assert with_current_names(node) == {**expected, "odd": {"_target_": 5}}
    assert override_with_current_names(f"+callbacks.x._target_={old}") == f"+callbacks.x._target_={new}"
    both = f"callbacks.x={{_target_: {old}, y: {{'_target_': '{old}'}}, z: {old}}}"
    assert override_with_current_names(both) == f"callbacks.x={{_target_: {new}, y: {{'_target_': '{new}'}}, z: {old}}}"
    assert override_with_current_names("callbacks.divergence.policy=skip") == "callbacks.divergence.policy=skip"


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose files name every callback as they did before the modules moved."""
    cwd = tmp_path_factory.mktemp("old")
    steps = ["trainer.max_steps=3", "callbacks.last_checkpoint.every_n_train_steps=1"]
    poison = "+callbacks.nan={_target_: tests.support.sabotage.NaNGradient, first: 3}"
    folder = run(cwd, "run", *steps, poison, f"+callbacks.curvature._target_={CURVATURE[1]}", code=3)
    config = OmegaConf.load(folder / "config.yaml")
    del config.callbacks.nan  # which is no part of the project, and would have to be allowed
    for younger in ("stream_mixing", "source_weights", "gate_means"):  # than the move
        del config.callbacks[younger]
    OmegaConf.save(config, folder / "config.yaml")
    for path in (folder / "config.yaml", folder / "overrides.yaml"):
        text = path.read_text()
        for old, new in MOVED.items():
            text = text.replace(f"{new}.", f"{old}.")
        path.write_text(text)
    text = (folder / "config.yaml").read_text()
    assert "_target_: callbacks.divergence.Divergence\n" in text
    assert ".monitors." not in text
    return folder


def test_a_saved_run_opens_and_replays_without_a_word(
    old_run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_config(old_run).callbacks.curvature._target_ == CURVATURE[1]
    assert open_run(old_run).step == 3
    monkeypatch.setattr("sys.argv", ["replay", str(old_run)])
    replay.main()
    said = capfd.readouterr()
    assert "step 3" in said.out
    assert "is now" not in said.out + said.err


def test_a_saved_run_is_resumed_by_its_command_without_a_word(old_run: Path, tmp_path: Path) -> None:
    shutil.copytree(old_run, tmp_path / "run")
    command = resume_command(tmp_path / "run", max_steps=4)
    assert f"callbacks.curvature._target_={CURVATURE[1]}" in command
    overrides = tiny_job(f"+callbacks.curvature._target_={CURVATURE[1]}")
    finished = train(tmp_path, *overrides, "trainer.max_steps=4", "run_dir=run", "ckpt_path=last")
    assert finished.code == 3, finished.err  # its weights are no numbers
    assert "is now" not in finished.out + finished.err
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 4


def test_on_a_command_line_the_old_name_works_and_the_new_one_is_said(tmp_path: Path) -> None:
    old, new = CURVATURE
    finished = train(tmp_path, *tiny_job("run_dir=run", f"+callbacks.curvature._target_={old}"))
    assert finished.code == 0, finished.err
    assert [line for line in finished.err.splitlines() if "is now" in line] == [
        f"callbacks.curvature._target_={old} is now {new}"
    ]


def test_a_file_of_ones_own_that_imports_an_old_module_is_told_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "old_fashioned.py").write_text("from callbacks.block_monitor import BlockMonitor\n")
    refused = train(tmp_path, *tiny_job("run_dir=run", "+callbacks.mine._target_=old_fashioned.Mine"))
    assert refused.code == 2
    assert "callbacks.block_monitor is now callbacks.monitors.block_monitor" in refused.err
    assert len(refused.err.splitlines()) == 1


def test_a_renamed_field_is_understood_in_saved_values_and_on_a_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    node = {"model": {"checkpoint_every": 2, "moe": {"every": 3}}, "policy_options": {"every": 4}}
    expected = {
        "model": {"activation_checkpoint_every": 2, "moe": {"layer_interval": 3}},
        "policy_options": {"every": 4},
    }
    assert with_current_names(node) == expected
    assert with_current_names({"module": node}) == {"module": expected}
    config = parse(ModelConfig, "model", {"num_layers": 3, **node["model"]})
    assert (config.activation_checkpoint_every, config.moe.layer_interval) == (2, 3)
    with pytest.raises(ConfigError, match="every"):  # both: which of them is meant, nobody knows
        parse(ModelConfig, "model", {"moe": {"every": 2, "layer_interval": 3}})
    given = ["model.moe.every=2", "+model={moe: {every: 3}, checkpoint_every: 4}", "x.options={every: 5}", "~model.moe"]
    assert with_names_of_today(given) == [
        "model.moe.layer_interval=2",
        "+model={moe: {layer_interval: 3}, activation_checkpoint_every: 4}",
        *given[2:],
    ]
    assert capsys.readouterr().err.splitlines() == [
        "model.moe.every is now model.moe.layer_interval",
        "model.checkpoint_every is now model.activation_checkpoint_every",
        "model.moe.every is now model.moe.layer_interval",
    ]


def test_every_renamed_field_is_there_under_its_new_name_alone() -> None:
    schema = OmegaConf.create({"model": OmegaConf.structured(ModelConfig), "optim": OmegaConf.structured(OptimConfig)})
    for group, names in RENAMED_FIELDS.items():
        fields = OmegaConf.select(schema, group)
        for old, new in names.items():
            assert new in fields, new
            assert old not in fields, old


def test_an_optimizer_is_named_as_hydra_names_a_class() -> None:
    assert with_names_of_today(["optim._target_=torch.optim.SGD"]) == ["optim.optimizer=torch.optim.SGD"]
