"""The command line: Hydra composes, mistakes end in one clear message, signals in a way to resume."""

import functools
import gc
import os
import re
import select
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from core import overrides, sweep
from core.config_files import about_a_file_of_settings
from core.dataclass_cli import describe_fields, parse_fields
from core.errors import ConfigError, InvalidValue, UserError, one_line, suggest
from core.explain import explain_omegaconf
from core.file_errors import about_a_file
from core.printable import printable

FAULT = 1
USER_ERROR = 2
DIVERGED = 3
INTERRUPTED = 130
NOBODY_READS = 141  # 128 + SIGPIPE, as of other programs
MISTAKES = (UserError, HydraException, OmegaConfBaseException)
OURS = "HYDRA_FULL_ERROR_IS_OURS"
"""A variable for the processes that a run starts: it says that HYDRA_FULL_ERROR is not what the user asked for."""
DEBUGGING = os.environ.get("HYDRA_FULL_ERROR") == "1" and OURS not in os.environ


class RunDiverged(Exception):
    """callbacks.divergence has given the run up, or it has ended with a loss that is no finite number; it was said so.

    Attributes:
        step: the optimizer step that it was given up at, counted from 1; the weights are those before it. Or the last.
    """

    def __init__(self, step: int, line: str) -> None:
        self.step = step
        super().__init__(line)


def run(main: Callable[[], None]) -> None:
    """Call a `hydra.main` function; what the user can mend is said without a traceback, exit code 2.

    A run that was given up as diverged exits with 3, and one that a signal ended with 128 and its number. A fault of
    the project itself keeps its traceback and exits with 1. A sweep exits as the first of its runs that failed.
    """
    if not DEBUGGING:  # Hydra then raises instead of printing, so that the message can be better
        os.environ.update({"HYDRA_FULL_ERROR": "1", OURS: "1"})
    sys.path.append(os.getcwd())  # your own classes may lie where you are
    code = 0
    try:
        _call(main)
    finally:
        code = sweep.conclude()
    if code:
        raise SystemExit(code)


def _call(main: Callable[[], None]) -> None:
    try:
        sys.argv[1:] = overrides.with_names_of_today(sys.argv[1:])
        main()
        print(end="", flush=True)  # here, where it is known what to do when that fails
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain once more when it flushes
        raise SystemExit(NOBODY_READS) from None
    except BrokenProcessPool as error:  # joblib's
        print(f"Error: the sweep ends, as one of its processes was killed: {one_line(error)}", file=sys.stderr)
        raise SystemExit(FAULT) from None
    except MISTAKES as error:
        _leave(error)
    except Exception as error:  # among them Hydra's own about groups, which name none
        _leave_if_given(error)
        raise


def _nobody_reads() -> bool:
    """Return whether whoever read what is printed has gone, as `| head` does: nothing is left to say then."""
    poll = select.poll()
    poll.register(1, 0)
    return any(found & (select.POLLERR | select.POLLHUP) for _, found in poll.poll(0))


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
        except Exception as error:
            _leave_if_given(error)
            raise

    return wrapped


def tool(function: Callable[[Any], None]) -> Callable[..., None]:
    """Decorate a tool's main function, which takes its settings: what is left takes the arguments of a command line.

    Without any they are those of this process. --help is answered with the module's docstring and what the class of the
    settings, which the function's annotation names, says of each field.
    """

    @functools.wraps(function)
    def main(arguments: Sequence[str] | None = None) -> None:
        given = sys.argv[1:] if arguments is None else arguments
        (schema,) = (kind for name, kind in typing.get_type_hints(function).items() if name != "return")
        if {"-h", "--help"} & set(given):
            print(f"{str(function.__globals__['__doc__']).strip()}\n\n{describe_fields(schema)}")
        else:
            function(parse_fields(schema, given))

    return main


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
        if (mistake := about_a_group(error) or about_a_file(error) or about_a_file_of_settings(error)) is not None:
            _say(mistake)
            failure = sweep.Failure(USER_ERROR, explain(mistake))
        else:
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


def _leave_if_given(error: Exception) -> None:
    """End in one line where an error is about the command line, a configuration file or the disk, and not a fault."""
    if (mistake := about_a_group(error) or about_a_file(error) or about_a_file_of_settings(error)) is not None:
        mistake.__cause__ = error
        _leave(mistake)


def about_a_group(error: Exception) -> UserError | None:
    """Return what is wrong with a configuration group on the command line, where composing has failed at one."""
    frames = traceback.extract_tb(error.__traceback__)
    if not any(Path(frame.filename).match("hydra/_internal/*.py") for frame in frames[-6:]):
        return None
    return overrides.not_a_choice(sys.argv[1:])


def explain(error: BaseException, given: Sequence[str] | None = None) -> str:
    """Return the message for the user, with the valid choices where they are known.

    Args:
        error: what composing, or what was composed, has raised.
        given: the overrides that were composed; None: those of the command line.
    """
    arguments = sys.argv[1:] if given is None else given
    if isinstance(error, HydraException) and (wrong := overrides.not_a_choice(arguments)) is not None:
        return str(wrong)
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, UserError):
            return str(chain)
        if isinstance(chain, InterpolationResolutionError) and (
            wrong := overrides.broken_reference(str(chain.full_key), str(chain.msg).splitlines()[0], arguments)
        ):
            return str(wrong)
        if isinstance(chain, OmegaConfBaseException) and chain.full_key:
            return str(explain_omegaconf(chain, value=_given(chain, arguments)))
        chain = chain.__cause__
    # Hydra's merging of files names the file, and leaves the error that it speaks of behind.
    file, inner = re.match(r"In '(.+?)': ", str(error)), error.__context__
    if file is not None and isinstance(inner, OmegaConfBaseException) and inner.full_key:
        said = str(explain_omegaconf(inner)).replace("=None is not valid", " is not valid", 1)
        return f"in the configuration {file[1]}: {said}"
    text = re.split(r"\nSee https://|\n?Config search path|\n    full_key:", str(error))[0]
    text = re.sub(r"^In '\w+': |\.$", "", one_line(text))
    if isinstance(error, OverrideParseException):
        return str(InvalidValue("argument", _unparsed(error, arguments) or "", f"{text}; expected {overrides.GRAMMAR}"))
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return str(_no_such_choice(group, name) or ConfigError(group, name, suggest(name, error.options)))
    if missing := re.search("Could not load '(.+)/(.+)'", text):
        return str(_no_such_choice(missing[1], missing[2]) or text)
    return text


def _no_such_choice(group: str, name: str) -> ConfigError | None:
    """Return the error of a group, or of one above where there is none of this name: a name may have slashes in it."""
    while group and not overrides.choices(group):
        group, _, above = group.rpartition("/")
        name = f"{above}/{name}"
    return ConfigError(group, name, suggest(name, overrides.choices(group))) if group else None


def _given(error: OmegaConfBaseException, arguments: Sequence[str]) -> Any:
    """Return what the overrides set an error's field to: of several the last, or one of a group above."""
    return overrides.given(str(error.full_key), arguments)


def _unparsed(error: OverrideParseException, given: Sequence[str]) -> str | None:
    """Return the argument that is not of Hydra's grammar."""
    if error.override:
        return str(error.override)
    arguments = [argument for argument in given if not argument.startswith("-")]
    return next((argument for argument in arguments if not overrides.parse([argument])), None)
