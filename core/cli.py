"""The command line: Hydra composes, mistakes end in one clear message, signals in a way to resume."""

import functools
import gc
import os
import re
import sys
import traceback
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NoReturn

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core import sweep
from core.accelerator import register_resolver
from core.allocator import keep_freed_memory
from core.errors import ConfigError, UserError, one_line, suggest
from core.explain import explain_omegaconf
from core.printable import printable
from lightning_modules.config import ModelConfig, OptimConfig, writable_schema

FAULT = 1
USER_ERROR = 2
DIVERGED = 3
INTERRUPTED = 130
MISTAKES = (UserError, HydraException, OmegaConfBaseException)
OURS = "HYDRA_FULL_ERROR_IS_OURS"
"""In the environment of the processes that a run starts: HYDRA_FULL_ERROR is not what the user asked for."""
DEBUGGING = os.environ.get("HYDRA_FULL_ERROR") == "1" and OURS not in os.environ


class RunDiverged(Exception):
    """callbacks.divergence has given the run up, and said so; the weights are those before the step.

    Attributes:
        step: the optimizer step, counted from 1.
    """

    def __init__(self, step: int, line: str) -> None:
        self.step = step
        super().__init__(line)


def register_schemas() -> None:
    """Give Hydra the typed `model` and `optim` groups, which configs/train.yaml starts from, and our resolver."""
    register_resolver()
    store = ConfigStore.instance()
    for name, schema in (("model", ModelConfig), ("optim", OptimConfig)):
        node = writable_schema(schema)
        for child in node.values():
            if OmegaConf.get_type(child) is dict:
                OmegaConf.set_struct(child, False)  # options: what they may hold is known where they are used
        store.store(group="schema", name=name, node=node, package=name)


def run(main: Callable[[], None]) -> None:
    """Call a `hydra.main` function; what the user can mend is said without a traceback, exit code 2.

    A run that was given up as diverged exits with 3, and one that a signal ended with 128 and its number. A fault of
    the project itself keeps its traceback and exits with 1. A sweep exits as the first of its runs that failed.
    """
    # Before torch is imported: OpenMP threads that spin without end bring a busy machine to a halt (docs/decisions.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    keep_freed_memory()
    if not DEBUGGING:  # Hydra then raises instead of printing, so that the message can be better
        os.environ.update({"HYDRA_FULL_ERROR": "1", OURS: "1"})
    sys.path.append(os.getcwd())  # your own classes may lie where you are
    register_schemas()
    code = 0
    try:
        _call(main)
    finally:
        code = sweep.conclude()
    if code:
        raise SystemExit(code)


def _call(main: Callable[[], None]) -> None:
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BrokenProcessPool as error:  # joblib's
        print(f"Error: the sweep ends, as one of its processes was killed: {one_line(error)}", file=sys.stderr)
        raise SystemExit(FAULT) from None
    except MISTAKES as error:
        _leave(error)
    except ValueError as error:  # not a HydraException, but Hydra's
        if not str(error).startswith("Config group override"):
            raise
        _leave(HydraException(f"{error}; choose with GROUP=NAME, or leave it out with ~GROUP"))


def job(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Decorate the function under `hydra.main`: its mistakes end here, before Hydra adds words of its own.

    What it returns is what a sweeper minimizes. In a sweep what goes wrong ends the run alone, which then counts as
    core.sweep.WORST_LOSS; signals end the sweep.
    """

    @functools.wraps(task)
    def wrapped(config: DictConfig) -> Any:
        if sweep.is_swept():
            return _one_of_many(task, config)
        try:
            return task(config)
        except MISTAKES as error:
            _leave(error)
        except RunDiverged:
            raise SystemExit(DIVERGED) from None

    return wrapped


def _one_of_many(task: Callable[[DictConfig], Any], config: DictConfig) -> Any:
    sweep.note(ended=False)
    try:
        value = task(config)
    except MISTAKES as error:
        _say(error)
        failure = sweep.Failure(USER_ERROR, explain(error))
    except RunDiverged as error:
        failure = sweep.Failure(DIVERGED, f"diverged: {error}")
    except Exception as error:
        traceback.print_exception(error)
        failure = sweep.Failure(FAULT, f"{type(error).__name__}: {one_line(error)}")
    else:
        sweep.note(ended=True)
        return value
    sweep.note(ended=True, failure=failure)
    gc.collect()  # a failed run's tensors must not take the next one's memory
    return sweep.WORST_LOSS


def _leave(error: Exception) -> NoReturn:
    _say(error)
    raise SystemExit(USER_ERROR) from None


def _say(error: Exception) -> None:
    if DEBUGGING:
        traceback.print_exception(error)
    print(f"Error: {printable(explain(error), limit=None)}", file=sys.stderr, flush=True)


def explain(error: BaseException) -> str:
    """The message for the user, with the valid choices where they are known."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, UserError):
            return str(chain)
        if isinstance(chain, OmegaConfBaseException) and chain.full_key:
            return str(explain_omegaconf(chain, value=_given(chain.full_key)))
        chain = chain.__cause__
    text = re.split(r"\nSee https://|\n?Config search path|\n    full_key:", str(error))[0]
    text = re.sub(r"^In '\w+': |\.$", "", one_line(text))
    if isinstance(error, OverrideParseException):
        return f"{text}; expected FIELD=VALUE, +FIELD=VALUE for a new field, or ~FIELD to leave one out"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return str(ConfigError(group, name, suggest(name, error.options)))
    return text


def _given(field: str) -> str | None:
    """What the command line set a field, or one below it, to: the last of several overrides counts."""
    for argument in reversed(sys.argv[1:]):
        name, _, value = argument.partition("=")
        if f"{name.lstrip('+')}.".startswith(f"{field}."):
            return value
    return None
