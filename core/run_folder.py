"""Where a run lives: runs/EXPERIMENT/NAME with its config, checkpoints, logs and summary."""

import itertools
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from core.errors import ConfigError, UserError, require, writing
from core.mappings import flatten
from core.run_lock import held
from core.status import is_done
from core.whole_file import damage_of, is_whole, write_whole

RUNS = Path("runs")
NAME_LENGTH = 80  # file systems take 255 bytes; a table of runs takes less
LAST, PREVIOUS = Path("checkpoints/last.ckpt"), Path("checkpoints/previous.ckpt")
MAY_CHANGE = {  # in a resumed run: how it computes, and what follows from the step alone
    *("model.compile", "model.activation_checkpointing", "model.checkpoint_every"),
    *("model.moe.backend", "model.moe.expert_parallel"),
    *("optim.schedule", "optim.warmup_steps", "optim.min_lr_ratio", "optim.decay_fraction"),
}
ADDED = {"data.corpus", "data.task"}  # of which older checkpoints say nothing; they are resumed all the same


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, and the checkpoint that it resumes from, if any."""

    path: Path
    ckpt_path: Path | None

    @contextmanager
    def begun(self, trainer: Any, config: DictConfig, overrides: list[str]) -> Iterator[None]:
        """While it lasts, this process trains here and no other one. What is refused before the first step leaves no
        new folder.

        Raises:
            ConfigError: another process trains here, or the folder cannot be written to.
        """
        if not is_main_process():
            yield
            return
        is_new = not self.path.exists()
        with held(self.path):
            try:
                self.create(config, overrides)
                print(f"Run folder: {self.path}")
                yield
            except UserError:
                if is_new and trainer.global_step == 0:
                    shutil.rmtree(self.path, ignore_errors=True)
                raise

    def create(self, config: DictConfig, overrides: list[str]) -> None:
        """Make the folder and note what was asked for. A resumed run keeps the notes of its beginning."""
        with writing("run_dir", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            first = not (self.path / "config.yaml").exists()
            suffix = "" if first else time.strftime("-resumed-%Y-%m-%d_%H-%M-%S")
            # The configuration last: a folder with one is a run's, and has all that a run needs to go on.
            for name, content, resolve in (("overrides", OmegaConf.create(overrides), False), ("config", config, True)):
                save = partial(OmegaConf.save, content, resolve=resolve)
                write_whole(self.path / f"{name}{suffix}.yaml", save)


def folder_name(now: str, overrides: list[str]) -> str:
    """TIME, and after it what the command line asked for, `lr-1e-3_placement-postnorm`, as far as it fits.

    What stands elsewhere is left out (the experiment, the folder), and every name is fit for a shell and for Hydra's
    grammar without quotes: letters, digits, `.`, `-` and `_`.
    """
    name = now
    for override in overrides:
        field, _, value = override.lstrip("+~").partition("=")
        if field.lstrip("/") in ("experiment", "run_dir", "ckpt_path"):
            continue
        part = "-".join(re.findall(r"[A-Za-z0-9.]+", f"{re.split(r'[./]', field)[-1]} {value}".replace("_", " ")))
        if part and len(f"{name}_{part}") <= NAME_LENGTH:
            name = f"{name}_{part}"
    return name


def locate(config: DictConfig, experiment: str | None, name: str) -> RunFolder:
    """Decide on the folder from `run_dir` and `ckpt_path`; creates nothing.

    `ckpt_path=last` means the run in run_dir, or else this experiment's newest; a run that was killed before it saved
    anything begins again. A checkpoint of a run continues in the folder of that run, unless run_dir says otherwise.

    Args:
        config: the composed config.
        experiment: name of the chosen experiment; None: plain `python train.py`.
        name: of a new folder.

    Raises:
        ConfigError: a checkpoint that is not there, or damaged, or a folder that holds a run already.
    """
    plain = config.run_dir is None or isinstance(config.run_dir, str | int | float)
    require(plain, "run_dir", config.run_dir, "the name of a folder, or null")
    valid = (
        "the name of a folder, or null: empty, as from a variable of the shell that is not set, it would be this one"
    )
    require(str(config.run_dir).strip() != "", "run_dir", config.run_dir, valid)
    there = config.ckpt_path is None or (
        isinstance(config.ckpt_path, str | int | float) and str(config.ckpt_path).strip()
    )
    require(bool(there), "ckpt_path", config.ckpt_path, "last, or the path of a checkpoint")
    given = Path(str(config.run_dir)) if config.run_dir is not None else None
    siblings = RUNS / (experiment or "default")
    if config.ckpt_path is None:
        path = given or _fresh(siblings / name)
        taken = any((path / part).exists() for part in (LAST, PREVIOUS, "config.yaml"))
        valid = "a folder without a run in it, or ckpt_path=last beside it to resume that run"
        require(not (taken and is_main_process()), "run_dir", str(path), valid)
        return RunFolder(path, None)
    if config.ckpt_path == "last":
        runs = [given] if given else sorted(siblings.glob("*/"), key=_last_trained)
        resumable = [path for path in runs if (path / LAST).exists() or (path / PREVIOUS).exists()]
        if given and not resumable and (given / "config.yaml").exists():
            if is_main_process():
                print(f"The run in {given} has saved nothing yet: it begins again.")
            return RunFolder(given, None)
        valid = f"a run with a {LAST} in {given or siblings}, or the path of a checkpoint"
        require(bool(resumable), "ckpt_path", "last", valid)
        return RunFolder(resumable[-1], newest_whole(resumable[-1]))
    checkpoint = Path(str(config.ckpt_path))
    there = checkpoint.is_file() or (checkpoint / ".metadata").is_file()
    require(there, "ckpt_path", str(checkpoint), "last, or the path of a checkpoint")
    wrong = damage_of(checkpoint, thorough=is_main_process())
    require(not wrong, "ckpt_path", str(checkpoint), f"a whole checkpoint of this project ({wrong})")
    owner = checkpoint.absolute().parent.parent
    home = owner if (owner / "config.yaml").exists() else _fresh(siblings / name)
    return RunFolder(given or home, checkpoint)


def newest_whole(run: Path) -> Path:
    """The run's last checkpoint, or the one before it where the last is damaged, which is said.

    Raises:
        ConfigError: neither is whole.
    """
    for path in (run / LAST, run / PREVIOUS):
        if path.exists() and is_whole(path, thorough=is_main_process()):
            return path
    raise ConfigError("ckpt_path", "last", f"a whole checkpoint in {run / LAST.parent}")


def _last_trained(run: Path) -> float:
    """When: what is evaluated of a run later touches its folder, but not this."""
    return max((path.stat().st_mtime for path in (run / LAST, run / "config.yaml") if path.exists()), default=0.0)


def _fresh(path: Path) -> Path:
    """The path, or PATH-2, PATH-3, ...: the first that is not there yet."""
    names = itertools.chain([path.name], (f"{path.name}-{n}" for n in itertools.count(2)))
    return next(fresh for name in names if not (fresh := path.with_name(name)).exists())


def check_resumable(run: RunFolder, module: Any, datamodule: Any, max_steps: int) -> None:
    """Hold the checkpoint against what is asked for: nothing may be resumed as something else, or silently ignored.

    At its last step only a run goes on that was killed before all else was written: nothing is trained any more.

    Args:
        run: with a checkpoint, whole, of one file or a folder of several processes'.
        module: the LightningModule; its hyperparameters must be those of the checkpoint.
        datamodule: the DataModule; where it has a `stream_identity`, that must be the checkpoint's.
        max_steps: where the run is to end.

    Raises:
        ConfigError: it cannot be read, is of another model, optimizer or stream (names the first field that differs),
            or is at the end already.
    """
    from core.checkpoint import load_beside_weights

    checkpoint = run.ckpt_path
    assert checkpoint is not None
    try:
        content = load_beside_weights(checkpoint)
        saved, step = content["hyper_parameters"], content["global_step"]
    except Exception as error:  # whole, but something else, or in pieces of which one is missing
        valid = "a whole checkpoint of this project; this file cannot be read as one"
        raise ConfigError("ckpt_path", str(checkpoint), valid) from error
    position = content.get(type(datamodule).__qualname__, {})
    old = flatten({**saved, "data": position.get("stream_identity", {})}, ".")
    new = flatten({**module.hparams, "data": getattr(datamodule, "stream_identity", {})}, ".")
    for field in sorted((old.keys() | new.keys()) - MAY_CHANGE - (ADDED - old.keys())):
        if old.get(field) != new.get(field):
            raise ConfigError(field, new.get(field), f"{old.get(field)!r}, as in the checkpoint that is resumed")
    if step == max_steps and checkpoint.absolute() == (run.path / LAST).absolute() and not is_done(run.path, step):
        if is_main_process():
            print(f"The run in {run.path} is trained to its last step, {step}; what it lacks is written now.")
        return
    require(step < max_steps, "trainer.max_steps", max_steps, f"more than {step}, the step of the checkpoint")


def resume_command(run_dir: Path, max_steps: int | None = None) -> str:
    """The command line that goes on with a run: its own overrides, its folder, its last checkpoint.

    Args:
        run_dir: the run's folder.
        max_steps: another end than the run's own.
    """
    # As they were given, references and all.
    given: Any = OmegaConf.to_container(OmegaConf.load(run_dir / "overrides.yaml"), resolve=False)
    overrides = [str(override) for override in given]
    replaced = {"run_dir", "ckpt_path", *(["trainer.max_steps"] if max_steps else [])}
    kept = [item for item in overrides if item.split("=")[0] not in replaced]
    kept += [f"trainer.max_steps={max_steps}"] if max_steps else []
    script = "train.py" if Path(sys.argv[0]).name != "train.py" else sys.argv[0]
    # The environment's own interpreter, also where it is not activated.
    python = Path(sys.executable).absolute()
    interpreter = str(_display(python)) if python.is_relative_to(Path.cwd()) else "python"
    return shlex.join([interpreter, script, *kept, f"run_dir={_quoted(str(_display(run_dir)))}", "ckpt_path=last"])


def _display(path: Path) -> Path:
    """Relative to the working folder where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path


def _quoted(value: str) -> str:
    """As Hydra's grammar wants it: quoted where there is more in it than a plain word or path."""
    if re.fullmatch(r"[\w./-]+", value):
        return value
    return "'" + value.replace("'", "\\'") + "'"


def is_main_process() -> bool:
    """Whether this process is global rank 0, also before a process group exists."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0
