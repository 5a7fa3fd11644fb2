"""What the tests share: models small enough to be free, and the same random numbers for every test."""

import sys
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors, and xdist runs one worker a core


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def hub_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A place of the tests' own for the code that comes with exported models; one, as Python imports it once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield
