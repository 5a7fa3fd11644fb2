"""The command line: Hydra composes, mistakes end in one clear message, signals in a way to resume."""

import os
import re
import sys
import traceback
from collections.abc import Callable

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from core.errors import ConfigError
from core.explain import explain_omegaconf
from lightning_modules.config import ModelConfig, OptimConfig, writable_schema

USER_ERROR = 2
INTERRUPTED = 130


def register_schemas() -> None:
    """Give Hydra the typed `model` and `optim` groups; configs/train.yaml starts from them."""
    store = ConfigStore.instance()
    store.store(group="schema", name="model", node=writable_schema(ModelConfig), package="model")
    store.store(group="schema", name="optim", node=writable_schema(OptimConfig), package="optim")


def run(main: Callable[[], None]) -> None:
    """Call a `hydra.main` function; what the user can mend is said without a traceback, exit code 2.

    A fault of the project itself keeps its traceback and exits with 1.
    """
    debugging = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, so that the message can be better
    register_schemas()
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted before training started: nothing to save.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        if debugging:
            traceback.print_exc()
        print(f"Error: {explain(error)}", file=sys.stderr)
        raise SystemExit(USER_ERROR) from None


def explain(error: BaseException) -> str:
    """The message for the user, with the valid choices where they are known."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, ConfigError):
            return str(chain)
        if isinstance(chain, OmegaConfBaseException):
            return str(explain_omegaconf(chain, value=_given(chain.full_key)))
        chain = chain.__cause__
    text = str(error).strip()
    if isinstance(error, MissingConfigException):
        text = re.split(r"\n?Config search path", text)[0]
        text = re.sub(r"\s*Available options in '(\w+)':\s*", r". Valid choices of \1: ", text)
        text = re.sub(r"^In '\w+': ", "", text).replace("\n\t", ", ")
    return re.sub(r"\s*\n\s*", " ", text)


def _given(field: str | None) -> str | None:
    """What the command line set a field to."""
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name.lstrip("+~") == field:
            return value
    return None
