"""What the tests share: models small enough to be free, the same random numbers for each, and which device it is on.

A test sees no GPU, on any machine. One that carries the marker `gpu` sees what is there, and is skipped where there is
none; warnings do not fail it, as nobody has seen yet which ones others give there.
"""

import os
import sys
from collections.abc import Generator, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from tests.support.devices import without_gpus

# Tiny tensors, and xdist runs one worker a core: where two workers' threads wait for each other, tests take a hundred
# times as long. Without the variable Lightning's launchers set the process' number of threads, for all tests after.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Around all fixtures, those of a session too."""
    torch.set_num_threads(1)  # whatever the test before has set
    with nullcontext() if item.get_closest_marker("gpu") else without_gpus():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed notes for each device who called it, which takes longer
    if request.node.get_closest_marker("gpu"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    """A run of trainer=fsdp in this process leaves one, and there can be no second."""
    yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def hub_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A place of the tests' own for the code that comes with exported models; one, as Python imports it once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield
