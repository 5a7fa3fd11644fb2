"""Memory that is freed stays with the process: the next block of the same size comes without new pages."""

import ctypes
import platform
import subprocess
import sys

import pytest

from lightning_modules.layers.cpu_kernels import allocator
from tests.support.runs import ROOT

NEW_PAGES = """
import resource, runpy, sys

keep_freed_memory = runpy.run_path(sys.argv[2])["keep_freed_memory"]  # without torch, which its package imports

size = 1 << 26  # 64 MiB, and no constant, or it would be made only once

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed_memory()
page_faults()
print(page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_freed_block_comes_back_without_new_pages() -> None:
    def new_pages(how: str) -> int:
        command = [sys.executable, "-c", NEW_PAGES, how, allocator.__file__]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    assert new_pages("keep") < 100 < new_pages("leave")


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()
