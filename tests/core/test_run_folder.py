"""Where a run lives and how it is resumed; tests/test_train.py tries it on real runs."""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from core.errors import ConfigError
from core.run_folder import NAME_LENGTH, SWEPT_LENGTH, RunFolder, entered, folder_name, resume_command
from core.run_lock import held
from core.status import LOCK, is_running


def asked(**values: Any) -> DictConfig:
    return OmegaConf.create({"run_dir": None, "ckpt_path": None, **values})


@pytest.fixture(autouse=True)
def _cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def place(config: DictConfig, experiment: str | None = "moe", name: str = "now") -> tuple[Path, Path | None]:
    """Where a run would go, and from what: it does not begin, so that nothing of it stays."""
    with entered(config, experiment, name) as run:
        assert run.path.is_dir()
        return run.path, run.ckpt_path


def test_a_new_run_goes_below_its_experiment() -> None:
    assert place(asked()) == (Path("runs/moe/now"), None)
    assert place(asked(), None) == (Path("runs/default/now"), None)
    assert place(asked(run_dir=5)) == (Path("5"), None)
    assert not list(Path().iterdir()), "what does not begin leaves nothing"
    Path("runs/moe/now").mkdir(parents=True)
    assert place(asked()) == (Path("runs/moe/now-2"), None)
    with entered(asked(), "moe", "now") as second, entered(asked(), "moe", "now") as third:
        assert (second.path.name, third.path.name) == ("now-2", "now-3")
    assert not list(Path("runs/moe/now").iterdir()), "of another process, which may be about to write to it"


def test_a_checkpoint_from_elsewhere_starts_a_new_folder_and_one_of_a_run_goes_on_there() -> None:
    for folder in (Path("somewhere/checkpoints"), Path("run/checkpoints")):
        folder.mkdir(parents=True)
        torch.save({}, folder / "x.ckpt")
    Path("run/config.yaml").touch()
    path = "somewhere/checkpoints/x.ckpt"
    assert place(asked(ckpt_path=path)) == (Path("runs/moe/now"), Path(path))
    path = "run/checkpoints/x.ckpt"
    assert place(asked(ckpt_path=path)) == (Path("run").absolute(), Path(path))
    assert place(asked(ckpt_path=path, run_dir="other")) == (Path("other"), Path(path))


@pytest.mark.parametrize(("values", "field"), [({"ckpt_path": "last"}, "ckpt_path"), ({"ckpt_path": "."}, "ckpt_path")])
def test_what_is_not_there_is_refused(values: dict[str, str], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        place(asked(**values))
    assert error.value.field == field
    assert not list(Path().iterdir())


@pytest.mark.parametrize("path", ["file", "file/run", "nowhere/run", "nowhere"])
def test_what_cannot_be_a_folder_is_refused(path: str) -> None:
    Path("file").write_text("")
    Path("nowhere").symlink_to("missing")
    with pytest.raises(ConfigError, match=f"run_dir='{path}' is not valid: expected a folder that can be written to"):
        place(asked(run_dir=path))
    assert sorted(path.name for path in Path().iterdir()) == ["file", "nowhere"]


def test_a_folder_is_locked_before_it_is_looked_at() -> None:
    with entered(asked(run_dir="run"), "moe", "now"):
        with pytest.raises(ConfigError, match="a folder in which no other process trains"):
            place(asked(run_dir="run"))
        assert (Path("run") / LOCK).exists()
    assert not Path("run").exists()


def test_a_run_that_came_meanwhile_is_not_overwritten() -> None:
    """As on a file system without locks."""
    with entered(asked(run_dir="run"), "moe", "now") as run:
        Path("run/config.yaml").write_text("seed: 1\n")
        with pytest.raises(ConfigError, match="run_dir='run' is not valid: expected a folder without a run in it"):
            run.create(asked(seed=2), [])
    assert Path("run/config.yaml").read_text() == "seed: 1\n"


def test_a_lock_that_was_removed_with_its_folder_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process before is refused and removes its folder, while the next one waits for the lock in it."""

    def remove(_: float) -> None:
        (Path("run") / LOCK).unlink()
        Path("run").rmdir()
        first.__exit__(None, None, None)

    first = held(Path("run"))
    first.__enter__()
    monkeypatch.setattr("core.run_lock.time.sleep", remove)
    with held(Path("run")):
        assert is_running(Path("run")), "whoever comes now finds the lock"


def test_the_command_repeats_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some where/train.py"])
    overrides = ["experiment=moe", "+callbacks.mine={a: 1}", "trainer.max_steps=7", "run_dir=old", "ckpt_path=x.ckpt"]
    path = Path("runs/moe/a run").absolute()
    RunFolder(path, None).create(asked(seed=1), overrides)
    command = ["python", "/some where/train.py", *overrides[:2]]
    first = [*command, "trainer.max_steps=7", "run_dir='runs/moe/a run'", "ckpt_path=last"]
    assert shlex.split(resume_command(path)) == first
    run = RunFolder(path, None, holds_run=True)
    run.create(asked(seed=2), [*overrides, "optim.schedule=wsd"])
    assert OmegaConf.load(run.path / "config.yaml").seed == 1
    command += ["optim.schedule=wsd"]  # as the process that trained it last was asked
    end = ["run_dir='runs/moe/a run'", "ckpt_path=last"]
    assert shlex.split(resume_command(run.path)) == [*command[:-1], "trainer.max_steps=7", command[-1], *end]
    assert shlex.split(resume_command(run.path, max_steps=14)) == [*command, "trainer.max_steps=14", *end]


@pytest.mark.parametrize("name", ["lr=1,b", "a run (a)", "it's", "a\\b", "2026-11-24_05-42-00", "5"])
def test_any_folder_can_be_resumed_by_the_command(name: str) -> None:
    run = RunFolder(Path(name), None)
    run.create(asked(), [])
    (override, _) = OverridesParser.create().parse_overrides(shlex.split(resume_command(run.path))[2:])
    assert override.key_or_group == "run_dir"
    assert str(override.value()) == name


def test_the_command_names_the_interpreter_of_the_environment_here(monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder(Path("run"), None).create(asked(), [])
    monkeypatch.setattr(sys, "executable", str(Path(".venv/bin/python").absolute()))
    assert shlex.split(resume_command(Path("run")))[0] == ".venv/bin/python"
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert shlex.split(resume_command(Path("run")))[0] == "python"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "now"),
        (["experiment=moe", "run_dir=x", "ckpt_path=last"], "now"),
        (["model.placement=postnorm", "optim.lr=1e-3"], "now_placement-postnorm_lr-1e-3"),
        (["+callbacks.mine={a: 1}", "~logger", "data.path='my texts/ü'"], "now_mine-a-1_logger_path-my-texts"),
        (["model.init=scale_init", "/x/y@z=$(rm -rf ~)"], "now_init-scale-init_y-z-rm-rf"),
        (["a.long=" + 100 * "x", "seed=1"], "now_seed-1"),
    ],
)
def test_a_folder_is_named_after_what_was_asked_for(overrides: list[str], name: str) -> None:
    assert folder_name("now", overrides) == name


def test_names_are_bounded() -> None:
    assert 60 < len(folder_name("now", [f"field={n}" for n in range(1000)])) <= NAME_LENGTH


def test_what_a_sweep_varies_comes_first_and_is_never_left_out() -> None:
    many = [f"model.some_long_field_{n}=value" for n in range(8)]
    swept = ["optim.lr=1e-3", f"data.path={'x' * 60}"]
    name = folder_name("now", [*many, *swept], swept)
    assert name.startswith(f"now_lr-1e-3_path-{'x' * 60}")
    assert len(name) <= NAME_LENGTH
    assert len(folder_name("now", [], [f"field={n}" for n in range(1000)])) <= SWEPT_LENGTH


@pytest.mark.parametrize("had_lock", [False, True])
def test_a_resumption_that_is_refused_in_its_first_step_leaves_the_folder_as_it_was(had_lock: bool) -> None:
    """The flight recorder has written by then, and TensorBoard another file beside the first."""
    run = Path("run")
    for name in ("config.yaml", "overrides.yaml", "checkpoints/last.ckpt", "events.out.tfevents.1", "notes/mine.txt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("[]")
    (run / LOCK).touch() if had_lock else None
    before = {path: path.read_text() for path in run.rglob("*") if path.is_file()}
    trainer = SimpleNamespace(global_step=3)

    def resume() -> None:
        folder = RunFolder(run, run / "checkpoints/last.ckpt", holds_run=True)
        with held(run), folder.running(trainer, asked(), [], step=3):
            (run / "events.out.tfevents.2").write_text("x")
            (run / "flight_recorder").mkdir()
            (run / "flight_recorder/step_4_rank_0.pt").write_text("x")
            (run / "notes/more.txt").write_text("x")  # by somebody else
            raise ConfigError("ckpt_path", "x", "another")

    with pytest.raises(ConfigError, match="expected another"):
        resume()
    (run / "notes/more.txt").unlink()
    (run / LOCK).unlink() if not had_lock else None
    assert {path: path.read_text() for path in run.rglob("*") if path.is_file()} == before
    assert not (run / "flight_recorder").exists()


def test_the_lock_of_a_run_that_goes_on_nowhere_is_removed_and_one_that_was_there_stays() -> None:
    (Path("run/checkpoints")).mkdir(parents=True)
    torch.save({"global_step": 1}, "run/checkpoints/last.ckpt")
    place(asked(run_dir="run", ckpt_path="last"))
    assert not Path("run", LOCK).exists()
    Path("run", LOCK).touch()
    place(asked(run_dir="run", ckpt_path="last"))
    assert Path("run", LOCK).exists()
