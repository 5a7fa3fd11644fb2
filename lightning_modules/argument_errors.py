"""Says what the library refuses in the words of the configuration."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import ConfigError, InvalidValue, UserError, one_line
from spannorm import InvalidArgument
from spannorm.import_path import is_import_path

FIELDS = {
    **{"placement": "model.placement", "norm": "model.norm", "init": "model.init"},
    "norm_options.kind": "model.norm_options.kind",
    **{"schedule": "optim.schedule", "optimizer": "optim.optimizer"},
}
"""The arguments that name what takes the options, and the field of each."""


@contextmanager
def as_config_errors(group: str) -> Iterator[None]:
    """Raise an InvalidArgument of the library as the ConfigError of the field that the argument came from.

    Args:
        group: dotted name of the options that are handed on, as `model.norm_options`.
    """
    try:
        yield
    except InvalidArgument as error:
        raise ConfigError(FIELDS.get(error.name, f"{group}.{error.name}"), error.value, error.valid) from error


@contextmanager
def as_error_of_own(field: str, name: str) -> Iterator[None]:
    """Raise whatever a class or function of the user's own raises as one line about the field that names it.

    Args:
        field: dotted name of the field, as `model.placement`.
        name: what it says; of an entry of a registry errors stay as they are, as they are this project's.
    """
    try:
        yield
    except (InvalidArgument, UserError):
        raise
    except Exception as error:  # their code may fail in any way
        if not is_import_path(name):
            raise
        raised = f"it raises {type(error).__name__}: {one_line(error)}{_place(error, name)}"
        raise InvalidValue(field, name, raised) from error


def _place(error: Exception, name: str) -> str:
    """Return, in brackets, the last line of the user's module that the error came through."""
    module = name.rpartition(".")[0]
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == module
    ]
    return f" ({Path(frames[-1][0]).name}, line {frames[-1][1]})" if frames else ""
