"""A run lives in runs/EXPERIMENT/NAME, with its config, checkpoints, logs and summary."""

import itertools
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.atomic_write import damage_of, is_whole, write_whole
from core.errors import ConfigError, InvalidValue, UserError, one_line, require, writing
from core.event_files import OLDER as OLDER_EVENTS
from core.event_files import PREFIX as EVENTS
from core.file_errors import about_a_file
from core.moved import override_with_current_names
from core.paths import require_path
from core.printable import printable
from core.provenance import FILE as PROVENANCE
from core.run_lock import held
from core.status import FILE as STATUS
from core.status import LOCK, is_done
from core.untrusted import is_within, read_yaml

RUNS = Path("runs")
NAME_LENGTH = 80  # file systems take 255 bytes; a table of runs takes less
SWEPT_LENGTH = 200  # what runs differ in matters more than the table
MAX_RETRIES = 100
WITHOUT_RUN = "a folder without a run in it, or ckpt_path=last beside it to resume that run"
OVERRIDES = "overrides.yaml"
LAST, PREVIOUS = Path("checkpoints/last.ckpt"), Path("checkpoints/previous.ckpt")
NOTES = r"((config|overrides)(-resumed-[\w-]+)?\.yaml|provenance(-resumed-[\w-]+)?\.json)"
BEGINNING = rf"{NOTES}|{re.escape(STATUS)}|{re.escape(EVENTS)}.*|{OLDER_EVENTS}|csv|flight_recorder|anatomy"
"""The names of what a run writes into its folder before the end of its first step."""
WRITTEN = rf"{BEGINNING}|checkpoints|comet|profile|wandb|mlflow\.db.*|(divergence|events|summary|status)\..*"
"""The names of all that a run writes into its folder, or removes there."""
MAY_CHANGE = {  # in a resumed run: how it computes, and what follows from the step alone
    "model.compile",
    "model.cpu_kernels",
    "model.activation_checkpointing",
    "model.activation_checkpoint_every",
    "model.moe.backend",
    "model.moe.expert_parallel",
    "optim.schedule",
    "optim.warmup_steps",
    "optim.min_lr_ratio",
    "optim.decay_fraction",
    "optim.decay_shape",
}
ABSENT_IN_OLD_CHECKPOINTS = {"data.corpus", "data.task"}
"""Older checkpoints say nothing of these, and are resumed all the same."""


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, and the checkpoint that it resumes from, if any.

    Attributes:
        is_new: this process has made the folder.
        holds_run: there was a run in it when this process got it, which goes on.
    """

    path: Path
    ckpt_path: Path | None
    is_new: bool = False
    holds_run: bool = False

    @contextmanager
    def running(
        self,
        trainer: Any,
        config: DictConfig,
        overrides: list[str],
        step: int = 0,
        made_by: Mapping[str, Any] | None = None,
    ) -> Iterator[None]:
        """Let the run train in the context. What is refused before the first step leaves no trace of a run.

        Args:
            trainer: not yet fitting.
            config: composed.
            overrides: of the command line.
            step: of the checkpoint that the run goes on from; 0: it is a new one.
            made_by: where the run comes from, as core.provenance.origin has it; None: it is not noted.

        Raises:
            ConfigError: the folder cannot be written to, or has become another run's.
        """
        if not is_main_process():
            yield
            return
        before, resumable = _names(self.path), _resumable(self.path)
        status = (self.path / STATUS).read_bytes() if STATUS in before else None
        try:
            self.create(config, overrides, made_by)
            print(f"Run folder: {printable(self.path, limit=None)}")
            yield
        except (UserError, OmegaConfBaseException, OSError, ValueError) as error:
            mistake = isinstance(error, UserError | OmegaConfBaseException) or about_a_file(error) is not None
            if mistake and trainer.global_step <= step and _resumable(self.path) == resumable:
                self._forget(before, status)
            raise

    def _forget(self, before: Collection[str], status: bytes | None) -> None:
        """Leave the folder as it was, with what else lies in one that the user has made."""
        if self.is_new:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for name in sorted(_names(self.path) - set(before), reverse=True):  # what lies in a folder before the folder
            path = self.path / name
            if re.fullmatch(BEGINNING, Path(name).parts[0]):
                with suppress(OSError):  # a folder in which something else has come to lie
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        if status is not None:
            write_whole(self.path / STATUS, lambda unfinished: unfinished.write_bytes(status))

    def create(self, config: DictConfig, overrides: list[str], made_by: Mapping[str, Any] | None = None) -> None:
        """Make the folder and note what was asked for. A resumed run keeps the notes of its beginning.

        Args:
            config: composed.
            overrides: of the command line.
            made_by: as in `running`.

        Raises:
            ConfigError: the folder cannot be written to; or a run has come into it meanwhile, which the lock prevents
                where the file system has locks.
            UserError: the overrides of its last process, which the command to go on repeats, cannot be read.
        """
        with writing("run_dir", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            first = not (self.path / "config.yaml").exists()
            require(first or self.holds_run, "run_dir", str(self.path), WITHOUT_RUN)
            noted = not first and os.path.lexists(self.path / OVERRIDES)
            if noted:
                read_overrides(self.path)
            suffix = "" if first else time.strftime("-resumed-%Y-%m-%d_%H-%M-%S")
            if made_by is not None:
                text = json.dumps(made_by, indent=2) + "\n"
                stem = Path(PROVENANCE).stem
                write_whole(self.path / f"{stem}{suffix}.json", lambda unfinished: unfinished.write_text(text))
            # The configuration last: a folder with one is a run's, and has all that a run needs to go on.
            for name, content, resolve in (
                (f"overrides{suffix if noted else ''}", OmegaConf.create(overrides), False),
                (f"config{suffix}", config, True),
            ):
                save = partial(OmegaConf.save, content, resolve=resolve)
                write_whole(self.path / f"{name}.yaml", save)


def folder_name(now: str, overrides: list[str], swept: Collection[str] = ()) -> str:
    """Return TIME, and after it what the command line asked for, `lr-1e-3_placement-postnorm`, as far as it fits.

    What a sweep varies comes first, so that it is never what does not fit. What stands elsewhere is left out (the
    experiment, the folder), and every name is fit for a shell and for Hydra's grammar without quotes: letters, digits,
    `.`, `-` and `_`.

    Args:
        now: the time.
        overrides: of the run.
        swept: those among them that differ between the runs of a sweep.
    """
    name = now
    for override in [*swept, *(override for override in overrides if override not in swept)]:
        field, _, value = override.lstrip("+~").partition("=")
        if field.lstrip("/") in ("experiment", "run_dir", "ckpt_path"):
            continue
        part = "-".join(re.findall(r"[A-Za-z0-9.]+", f"{re.split(r'[./]', field)[-1]} {value}".replace("_", " ")))
        limit = SWEPT_LENGTH if override in swept else NAME_LENGTH
        if part and len(f"{name}_{part}") <= limit:
            name = f"{name}_{part}"
    return name


@contextmanager
def entered(config: DictConfig, experiment: str | None, name: str) -> Iterator[RunFolder]:
    """Decide on the folder from `run_dir` and `ckpt_path`; while it lasts, the folder is this process' alone.

    `ckpt_path=last` means the run in run_dir, or else this experiment's newest; a run that was killed before it saved
    anything begins again. A checkpoint of a run continues in the folder of that run, unless run_dir says otherwise.

    The folder is claimed and locked before anything else, and only then looked at: nobody can train in it between the
    look and the use. Where the run does not begin, what was made for it is removed again. Of several processes of one
    run, the first one does all this.

    Args:
        config: the composed config.
        experiment: name of the chosen experiment; None: plain `python train.py`.
        name: of a new folder.

    Raises:
        ConfigError: a checkpoint that is not there, or damaged, a folder that holds a run already, in which another
            process trains, or that cannot be written to.
    """
    path = _choose(config, RUNS / (experiment or "default"))
    own = RUNS / (experiment or "default") / name
    if not is_main_process():
        yield RunFolder(path or own, _checkpoint(config, path or own))
        return
    with _claimed(path or own, by_another_name=path is None) as (path, is_new):
        if not is_new:
            refuse_links(path)
        before = _names(path)
        with held(path):
            try:
                yield RunFolder(path, _checkpoint(config, path), is_new, _holds_run(path))
            finally:
                if LOCK not in before and _names(path) - {LOCK} == before:  # nothing has begun
                    with suppress(OSError):
                        (path / LOCK).unlink()


@contextmanager
def _claimed(path: Path, by_another_name: bool) -> Iterator[tuple[Path, bool]]:
    """Make the folder, or, where there is one and another name will do, PATH-2, PATH-3, ...: the first that is new.

    Making a folder fails where it exists, so that of several processes one gets it. At the end those that were made
    here and are empty are removed, the folders above it included.

    Returns:
        The folder, and whether it is new.
    """
    name, numbers, retries = path.name, itertools.count(2), 0
    made: list[Path] = []
    with writing("run_dir", path):
        while True:
            try:
                _make_parents(path, made)
                path.mkdir()
                made.append(path)
                break
            except FileNotFoundError:  # a folder above it was another process', which has removed it
                retries += 1
                if retries == MAX_RETRIES:  # or it is a link to nowhere
                    raise
            except FileExistsError:
                if by_another_name:
                    path = path.with_name(f"{name}-{next(numbers)}")
                elif path.is_dir():
                    break
                else:
                    raise
    try:
        yield path, path in made
    finally:
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()


def _make_parents(path: Path, made: list[Path]) -> None:
    """Make the folders above a path that are not there, and add them to a list."""
    missing = list(itertools.takewhile(lambda folder: not folder.exists(), path.parents))
    for folder in reversed(missing):
        with suppress(FileExistsError):
            folder.mkdir()
            made.append(folder)


def refuse_links(path: Path) -> None:
    """Refuse a folder in which a run would write into, or delete, what is not its own: it may come from a stranger.

    Raises:
        ConfigError: names the first link that leads out of it, or pipe or device, which a run would wait for.
    """
    pending = [part for part in path.glob("*") if re.fullmatch(WRITTEN, part.name)]
    while pending:
        part = pending.pop()
        if part.is_symlink() and not is_within(path, part):
            reason = f"{part} leads out of it by a link, through which the run would write and delete; remove the link"
            raise InvalidValue("run_dir", str(path), reason)
        if part.exists() and not (part.is_file() or part.is_dir()):
            raise InvalidValue("run_dir", str(path), f"{part} is no regular file; remove it")
        of_an_older_run = part.parent == path / "wandb"  # where wandb itself makes links, and writes no more
        if part.is_dir() and not part.is_symlink() and not of_an_older_run:
            pending.extend(part.iterdir())


def _names(path: Path) -> set[str]:
    """Return what lies in a folder under the names of what a run writes, and below those, by its path from there."""
    parts = [part for part in path.glob("*") if re.fullmatch(rf"{WRITTEN}|{re.escape(LOCK)}", part.name)]
    return {str(found.relative_to(path)) for part in parts for found in (part, *part.rglob("*"))}


def _holds_run(path: Path) -> bool:
    return any((path / part).exists() for part in (LAST, PREVIOUS, "config.yaml"))


def _resumable(path: Path) -> bool:
    return (path / LAST).exists() or (path / PREVIOUS).exists()


def _choose(config: DictConfig, siblings: Path) -> Path | None:
    """Return the folder that the configuration names, by itself or by its checkpoint; None: a new one.

    Writes nothing.
    """
    plain = config.run_dir is None or isinstance(config.run_dir, str | int | float)
    require(plain, "run_dir", config.run_dir, "the name of a folder, or null")
    there = config.ckpt_path is None or isinstance(config.ckpt_path, str | int | float)
    require(there, "ckpt_path", config.ckpt_path, "last, or the path of a checkpoint")
    for field, what in (
        ("run_dir", "the name of a folder, or null"),
        ("ckpt_path", "last, or the path of a checkpoint"),
    ):
        if config[field] is not None:
            require_path(field, config[field], what)
    given = Path(str(config.run_dir)) if config.run_dir is not None else None
    if config.ckpt_path is None:
        return given
    if config.ckpt_path == "last":
        if given and not _resumable(given) and (given / "config.yaml").exists():
            return given
        runs = [given] if given else sorted(siblings.glob("*/"), key=_last_trained)
        resumable = [path for path in runs if _resumable(path)]
        valid = f"a run with a {LAST} in {given or siblings}, or the path of a checkpoint"
        require(bool(resumable), "ckpt_path", "last", valid)
        return resumable[-1]
    from core import sharded_checkpoint

    checkpoint = Path(str(config.ckpt_path))
    there = checkpoint.is_file() or sharded_checkpoint.is_there(checkpoint)
    require(there, "ckpt_path", str(checkpoint), "last, or the path of a checkpoint")
    owner = checkpoint.absolute().parent.parent
    return given or (owner if (owner / "config.yaml").exists() else None)


def _checkpoint(config: DictConfig, path: Path) -> Path | None:
    """Return the checkpoint to resume from, once nobody else trains in the folder.

    Raises:
        ConfigError: it is damaged; or the run is to be a new one, and the folder holds a run.
    """
    if config.ckpt_path is None:
        require(not (is_main_process() and _holds_run(path)), "run_dir", str(path), WITHOUT_RUN)
        return None
    if config.ckpt_path == "last":
        if _resumable(path):
            return newest_whole(path)
        others = sorted((path / LAST.parent).glob("*.ckpt"))  # as callbacks.last_checkpoint=null leaves them
        valid = f"the path of a checkpoint: the run has no last one, and {', '.join(map(str, others))} would be lost"
        require(not others, "ckpt_path", "last", valid)
        if is_main_process():
            print(f"The run in {printable(path)} has saved nothing yet: it begins again.")
        return None
    checkpoint = Path(str(config.ckpt_path))
    wrong = damage_of(checkpoint, thorough=is_main_process())
    require(not wrong, "ckpt_path", str(checkpoint), f"a whole checkpoint of this project ({wrong})")
    return checkpoint


def newest_whole(run: Path) -> Path:
    """Return the run's last checkpoint, or the one before it where the last is damaged, which is said.

    Raises:
        ConfigError: neither is whole.
    """
    for path in (run / LAST, run / PREVIOUS):
        if path.exists() and is_whole(path, thorough=is_main_process()):
            return path
    raise ConfigError("ckpt_path", "last", f"a whole checkpoint in {run / LAST.parent}")


def _last_trained(run: Path) -> float:
    """Return when a run was last trained: evaluating it later touches its folder, but not these files."""
    times = [0.0]
    for path in (run / LAST, run / "config.yaml"):
        with suppress(OSError):  # not there, or not any more
            times.append(path.stat().st_mtime)
    return max(times)


def check_resumable(
    run: RunFolder, trainer: Any, module: Any, datamodule: Any, config: DictConfig | None = None
) -> int:
    """Hold the checkpoint against what is asked for: nothing may be resumed as something else, or silently ignored.

    At its last step only a run goes on that was killed before all else was written: nothing is trained any more.

    Args:
        run: with a checkpoint, whole, of one file or a folder of several processes'.
        trainer: not yet fitting; it knows where the run is to end.
        module: the LightningModule; its hyperparameters must be those of the checkpoint.
        datamodule: the DataModule; where it has a `stream_identity`, that must be the checkpoint's.
        config: the composed configuration, for the names of fields.

    Returns:
        The checkpoint's optimizer step.

    Raises:
        ConfigError: it cannot be read, is of another model, optimizer or stream (names the first field that differs),
            or is at the end already, or out of time.
    """
    from core.checkpoint import load_beside_weights
    from core.early_end import check_time_left

    checkpoint, max_steps = run.ckpt_path, trainer.max_steps
    assert checkpoint is not None
    try:
        content = load_beside_weights(checkpoint)
        saved, step = content["hyper_parameters"], content["global_step"]
    except Exception as error:  # whole, but something else, or in pieces of which one is missing
        valid = f"a whole checkpoint of this project ({one_line(error)})"
        raise ConfigError("ckpt_path", str(checkpoint), valid) from error
    valid = (
        f"a checkpoint of training: this one has weights alone; init_from={checkpoint} starts a new run_dir from them"
    )
    require(checkpoint.is_dir() or "optimizer_states" in content, "ckpt_path", str(checkpoint), valid)
    position = content.get(type(datamodule).__qualname__, {})
    _check_same_data(content, datamodule)
    identity = position.get("stream_identity", {}) if isinstance(position, dict) else {}
    # A module of one's own need not say what its hyperparameters stand for: they are compared as they are.
    in_effect = getattr(module, "settings_in_effect", partial(flatten, separator="."))
    old = {**in_effect(saved), **flatten({"data": identity}, ".")}
    new = {**in_effect(module.hparams), **flatten({"data": getattr(datamodule, "stream_identity", {})}, ".")}
    for field in sorted((old.keys() | new.keys()) - MAY_CHANGE - (ABSENT_IN_OLD_CHECKPOINTS - old.keys())):
        if old.get(field) != new.get(field):
            raise ConfigError(field, new.get(field), f"{old.get(field)!r}, as in the checkpoint that is resumed")
    if step == max_steps and checkpoint.absolute() == (run.path / LAST).absolute() and not is_done(run.path, step):
        if is_main_process():
            print(
                f"The run in {printable(run.path)} is trained to its last step, {step}; what it lacks is written now."
            )
    else:
        require(step < max_steps, "trainer.max_steps", max_steps, f"more than {step}, the step of the checkpoint")
    check_time_left(trainer, content, config)
    return int(step)


def flatten(values: Mapping[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one flat mapping: {"model": {"dim": 8}} becomes {"model.dim": 8}.

    An empty mapping stays a value.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, separator, f"{prefix}{key}{separator}"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _check_same_data(content: dict[str, Any], datamodule: Any) -> None:
    """Refuse a DataModule of another class than the checkpoint's: a position in its stream means nothing in another."""
    from core.checkpoint_values import data_states

    saved = list(data_states(content))
    own = type(datamodule).__qualname__
    if own not in saved and (saved or hasattr(datamodule, "stream_identity")):
        valid = (
            f"{' or '.join(saved)}, as in the checkpoint that is resumed"
            if saved
            else ("a DataModule that keeps no position: the checkpoint that is resumed has none")
        )
        raise ConfigError("data._target_", own, valid)


def of_last_process(run_dir: Path, name: str) -> Path:
    """Return where the process that trained a run last has written a file of this name: of a resume, with its time."""
    resumed = (path.name for path in run_dir.glob(f"{Path(name).stem}-resumed-*.yaml"))
    return run_dir / max(resumed, default=name)


def read_overrides(run_dir: Path) -> list[str]:
    """Return the overrides of the process that trained a run last, as they were given, references and all.

    Raises:
        UserError: they are not there, cannot be read, or are no list of texts.
    """
    path = of_last_process(run_dir, OVERRIDES)
    given = read_yaml(path)
    if not isinstance(given, list) or not all(isinstance(override, str) for override in given):
        raise UserError(f"{path} cannot be read as the run's overrides: expected a list of FIELD=VALUE, or []")
    return given


def resume_command(run_dir: Path, max_steps: int | None = None) -> str:
    """Return the command line that goes on with a run: its own overrides, its folder, its last checkpoint.

    Args:
        run_dir: the run's folder.
        max_steps: another end than the run's own.
    """
    overrides = read_overrides(run_dir)
    replaced = {"run_dir", "ckpt_path", *(["trainer.max_steps"] if max_steps else [])}
    kept = [override_with_current_names(item) for item in overrides if item.split("=")[0] not in replaced]
    kept += [f"trainer.max_steps={max_steps}"] if max_steps else []
    script = "train.py" if Path(sys.argv[0]).name != "train.py" else sys.argv[0]
    # The environment's own interpreter, also where it is not activated.
    python = Path(sys.executable).absolute()
    interpreter = str(_display(python)) if python.is_relative_to(Path.cwd()) else "python"
    return shlex.join([interpreter, script, *kept, f"run_dir={_quoted(str(_display(run_dir)))}", "ckpt_path=last"])


def _display(path: Path) -> Path:
    """Return the path relative to the working folder where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path


def _quoted(value: str) -> str:
    """Return the value in Hydra's grammar: quoted where there is more in it than a plain word or path."""
    if re.fullmatch(r"[\w./-]+", value):
        return value
    return "'" + value.replace("'", "\\'") + "'"


def is_main_process() -> bool:
    """Return whether this process is global rank 0, also before a process group exists."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0
