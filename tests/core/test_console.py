"""What libraries print is kept from the console, and nothing else."""

import os

import pytest

from core.console import silent_if_it_fails


@silent_if_it_fails()
def say_and_fail() -> None:
    os.write(2, b"dropped\n")
    raise KeyError


def test_what_is_said_before_a_failure_is_dropped_and_else_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with silent_if_it_fails():
        os.write(2, b"kept\n")
        with silent_if_it_fails():
            os.write(2, b"inner\n")
    with pytest.raises(KeyError):
        say_and_fail()
    os.write(2, b"after\n")
    assert sorted(capfd.readouterr().err.split()) == ["after", "inner", "kept"]
