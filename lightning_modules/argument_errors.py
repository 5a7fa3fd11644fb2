"""Says what the library refuses in the words of the configuration."""

from collections.abc import Iterator
from contextlib import contextmanager

from core.errors import ConfigError
from spannorm import InvalidArgument

FIELDS = {
    **{"placement": "model.placement", "norm": "model.norm", "init": "model.init"},
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
