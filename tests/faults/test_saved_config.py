"""A run's folder from elsewhere: reading its configuration runs nothing that the user has not vouched for."""

import re
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from omegaconf import OmegaConf

from core import saved_config
from core.build import build
from core.errors import ConfigError, UserError
from core.saved_config import KINDS, load_config
from tests.support.runs import run


class Mine(L.Callback):
    """The user's own."""


def saved(folder: Path, config: Any) -> Path:
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    return folder


def test_what_this_project_saves_is_read(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", "experiment=moe_spannorm")
    assert load_config(folder).model.placement == "spannorm"


def test_an_own_callback_just_works_in_a_run_and_is_allowed_by_name_afterwards(tmp_path: Path) -> None:
    own = "tests.faults.test_saved_config.Mine"
    folder = run(tmp_path, "run", f"+callbacks.mine._target_={own}")
    with pytest.raises(ConfigError, match=rf"callbacks.mine._target_='{own}' is not valid: .*allow={own} runs it"):
        load_config(folder)
    assert load_config(folder, [own]).callbacks.mine._target_ == own


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "hydra.utils.get_method",
        "runpy.run_path",
        "torch.load",
        "torch.hub.load",
        "torch.utils.cpp_extension.load",
        "torch.nn.Linear",
        "torch.serialization.os.system",
        "lightning.pytorch.callbacks.progress.os.system",
        "callbacks.divergence.flight_recorder.Path",
        "lightning.LightningModule.load_from_checkpoint",
        "lightning.fabric.utilities.cloud_io._load",
        "core.build.build",
        "core.cli.run",
        "torchevil.Callback",
        "callbacks",
        "callbacks.",
        "",
        ".os.system",
        "os",
        5,
        None,
        ["os.system"],
        {"_target_": "os.system"},
    ],
)
@pytest.mark.parametrize("place", ["callbacks.mine", "data", "trainer.strategy.0.policy", "model.placement_options.x"])
def test_code_from_elsewhere_is_refused(tmp_path: Path, target: Any, place: str) -> None:
    config: Any = {"_target_": target, "_args_": ["touch x"], "_partial_": False}
    for name in reversed(place.split(".")):
        config = [config] if name == "0" else {name: config}
    with pytest.raises(ConfigError) as error:
        load_config(saved(tmp_path, config))
    assert error.value.field.startswith(f"{place}._target_")


HIDDEN = "${oc.create:{_target_: os.mkdir, path: ran}}"


@pytest.mark.parametrize(
    "node",
    [
        f'"{HIDDEN}"',
        f'["{HIDDEN}"]',
        f'!!pairs [a: "{HIDDEN}"]',  # tuples in a list: OmegaConf makes lists of them
        f'!!omap [a: "{HIDDEN}"]',
        f'!!set {{"{HIDDEN}"}}',
        f'!!python/tuple ["{HIDDEN}"]',
        f'!!str "{HIDDEN}"',
    ],
)
@pytest.mark.parametrize("tags", ["refused", "read"])
def test_a_reference_that_makes_a_target_is_found_wherever_yaml_hides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: str, tags: str
) -> None:
    """Once they ran what they named: the look went through lists and mappings, and OmegaConf through more."""
    monkeypatch.chdir(tmp_path)
    if tags == "read":  # a second line of defence, which has to hold without the first
        monkeypatch.setattr(saved_config, "parse_yaml", lambda text, where: yaml.unsafe_load(text))
    (tmp_path / "config.yaml").write_text(f"data:\n  _target_: datamodules.synthetic.Synthetic\n  x: {node}\n")
    with pytest.raises(UserError, match=r"holds no references|holds the tag|cannot be read as a configuration"):
        build(load_config(tmp_path), "data")
    assert not (tmp_path / "ran").exists()


LIGHTNING = "lightning.pytorch"


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("module.model.x", f"{LIGHTNING}.loggers.MLFlowLogger"),  # makes folders, or asks a server, as it is made
        ("data.x", f"{LIGHTNING}.loggers.NeptuneLogger"),
        ("trainer.logger", f"{LIGHTNING}.loggers.MLFlowLogger"),
        ("data", f"{LIGHTNING}.demos.mnist_datamodule.MNISTDataModule"),  # downloads into a folder that it is given
        ("module", f"{LIGHTNING}.demos.boring_classes.BoringModel"),
        ("module", "lightning.Trainer"),
        ("callbacks.x", f"{LIGHTNING}.loggers.CSVLogger"),
        ("logger.x", f"{LIGHTNING}.callbacks.ModelCheckpoint"),
        ("anything", f"{LIGHTNING}.callbacks.ModelCheckpoint"),
        ("callbacks.x", "torch.testing._internal.common_utils.TestCase"),
        ("callbacks.x", "callbacks.divergence.event_log.EventLog"),  # of the right place, and of another kind
        ("data", "datamodules.writer.CorpusWriter"),
        ("module", "lightning_modules.config.ModelConfig"),
        ("trainer.x", "lightning_modules.language_module.LanguageModule"),
        ("callbacks.x", f"{LIGHTNING}.cli.SaveConfigCallback"),
        ("trainer.x", f"{LIGHTNING}.utilities.testing.Trainer"),
        ("trainer.strategy", "lightning.Trainer"),
        ("optim.x", "lightning_modules.strategy.ShardedStrategy"),
    ],
)
def test_a_class_of_a_run_stands_in_its_own_group_only(tmp_path: Path, place: str, target: str) -> None:
    config: Any = {"_target_": target}
    for name in reversed(place.split(".")):
        config = {name: config}
    with pytest.raises(ConfigError, match="names code that is not this project's") as error:
        load_config(saved(tmp_path, config))
    assert error.value.field == f"{place}._target_"
    assert load_config(tmp_path, [target]) == config, "unless the user vouches for it"


def test_classes_of_lightning_stand_where_a_run_has_them(tmp_path: Path) -> None:
    config = {
        "trainer": {"_target_": "lightning.Trainer", "strategy": {"_target_": f"{LIGHTNING}.strategies.DDPStrategy"}},
        "callbacks": {"x": {"_target_": f"{LIGHTNING}.callbacks.ModelCheckpoint"}},
        "logger": {"x": {"_target_": f"{LIGHTNING}.loggers.CSVLogger"}},
    }
    assert load_config(saved(tmp_path, config)) == config


@pytest.mark.parametrize(
    "value", ["${oc.create:{_target_: os.system}}", "${oc.env:HOME}", "\\${oc.decode:x}", "lightning.${seed}"]
)
def test_references_are_refused_because_they_may_hide_one(tmp_path: Path, value: str) -> None:
    (tmp_path / "config.yaml").write_text(f"seed: Trainer\ntrainer:\n  _target_: '{value}'\n  x: '{value}'\n")
    with pytest.raises(ConfigError, match="holds no references"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "text", ["a: [", "!!python/object/apply:os.system ['touch x']", "\x00", "a: !!python/name:os.system"]
)
def test_what_is_no_plain_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="cannot be read as a configuration"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "module",
    ["torch.distributed.tensor.debug", "lightning.pytorch.cli", "lightning.fabric.cli", "core.cli", "tools.x"],
)
def test_of_the_packages_that_a_run_is_made_of_only_those_modules_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """A stranger's configuration decides not even which parts of torch are loaded."""
    imported: list[str] = []
    monkeypatch.setattr("core.saved_config.importlib.import_module", imported.append)
    for group in KINDS:
        with pytest.raises(ConfigError, match="names code that is not this project's"):
            load_config(saved(tmp_path, {group: {"_target_": f"{module}.X"}}))
    assert imported == []


@pytest.mark.parametrize("value", ["${a}" * 900, "${" * 2000, "${x:" + "[" * 1000, "${x:" + "a," * 1900 + "}"])
def test_references_that_would_unfold_or_take_long_are_not_parsed(tmp_path: Path, value: str) -> None:
    lines = "".join(f"a{n}: '{value}'\n" for n in range((1 << 20) // (len(value) + 20)))
    (tmp_path / "config.yaml").write_text(lines)
    begun = time.process_time()
    with pytest.raises(ConfigError, match="holds no references") as error:
        load_config(tmp_path)
    assert len(str(error.value)) < 500
    assert time.process_time() - begun < 5


def test_a_module_from_elsewhere_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"evil\.Callback"):
        load_config(saved(tmp_path, {"callbacks": {"x": {"_target_": "evil.Callback"}}}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("field", ["model.placement", "module.model.norm", "module.x.0.init", "optim.schedule"])
def test_an_import_path_is_allowed_by_name_and_not_imported_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    (tmp_path / "evil_norm.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    config: Any = "evil_norm.MyNorm"
    for name in reversed(field.split(".")):
        config = [config] if name == "0" else {name: config}
    with pytest.raises(ConfigError, match=r"names code that is not .* allow=evil_norm\.MyNorm runs it") as error:
        load_config(saved(tmp_path, config))
    assert error.value.field == field
    assert not (tmp_path / "ran").exists()
    assert load_config(tmp_path, ["evil_norm.MyNorm"]) == config, "nor by reading it"
    assert not (tmp_path / "ran").exists()


def test_one_line_says_how_to_allow_all(tmp_path: Path) -> None:
    config = {"model": {"placement": "my.A", "norm": "my.B", "init": "plain"}, "callbacks": {"x": {"_target_": "my.C"}}}
    way = "; allow=my.A,my.B,my.C runs it"
    with pytest.raises(ConfigError, match=re.escape(way)):
        load_config(saved(tmp_path, config))
    assert load_config(tmp_path, ["my.A", "my.B", "my.C"]) == config
