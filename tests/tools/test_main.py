"""`python -m tools`: every program with a line, its help, one that is started, and what bash completes."""

import dataclasses
import importlib
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from core.dataclass_cli import FIRST, field_docs
from core.overrides import top_level
from tests.support.runs import ROOT
from tools.__main__ import main, programs, words

PROGRAMS = programs()
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_all_are_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0] for line in lines if line.startswith("  ")}
    assert listed == {name.partition(".")[2] for name in PROGRAMS}
    assert {"tools.plan", "tools.runs", "studies.report", "benchmarks.moe"} <= PROGRAMS.keys()
    assert "  runs              List runs: what became of each, how far it is, its loss, its age." in lines
    main([])
    assert capsys.readouterr().out.splitlines() == lines


def test_none_is_started_otherwise() -> None:
    """By argparse, or by what else reads the command line for itself."""
    for name, tree in PROGRAMS.items():
        assert list(words(tree)), name
        source = (ROOT / f"{name.replace('.', '/')}.py").read_text()
        assert "argparse" not in source, name


def schema_of(module: ModuleType) -> Any:
    """The dataclass of the function that `cli.tool` decorates."""
    functions = [getattr(value, "__wrapped__", None) for value in vars(module).values()]
    own = [function for function in functions if getattr(function, "__module__", None) == module.__name__]
    hints = [next(iter(typing.get_type_hints(function).values()), None) for function in own]
    (schema,) = filter(dataclasses.is_dataclass, hints)
    return schema


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_says_what_each_field_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(name)
    module.main(["--help"])
    out, fields = capsys.readouterr().out, dataclasses.fields(schema_of(module))
    assert out.startswith(str(module.__doc__).splitlines()[0])
    assert list(field_docs(schema_of(module))) == [field.name for field in fields], "all are described, in order"
    configs = [field.metadata["overrides_of"] for field in fields if "overrides_of" in field.metadata]
    named = [field.name for field in fields if field.metadata != FIRST and "overrides_of" not in field.metadata]
    assert all(f"  {name}=" in out for name in named)
    offered = list(dict.fromkeys(word.partition("=")[0] for word in words(PROGRAMS[name])))
    of_config = {name for config in configs for name in top_level(config)} - {"hydra"}
    assert not of_config & set(named), "of each it is clear whose it is"
    assert set(offered) - set(named) == of_config
    assert [word for word in offered if word not in of_config] == named


def run(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools", *arguments]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


def test_a_name_starts_a_tool(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert run(tmp_path, "runs", "status=failed").stdout == "No such runs in runs.\n"
    refused = run(tmp_path, "runs", "--status", "failed")
    assert (refused.returncode, refused.stderr) == (2, "Error: --status failed is now status=failed\n")
    unknown = run(tmp_path, "runns")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("Error: NAME='runns' is not valid: expected one of anatomy, check_gpu, ")
    assert unknown.stderr.endswith("(did you mean runs?)\n")
    assert run(tmp_path, "--shell-completion", "fish").returncode == 2


BEFORE = "other() { COMPREPLY=(from_before); }; complete -F other python\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash completes")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [("checkpoint=b", ["checkpoint=best"]), ("output=mi", ["output=mine"]), ("output=no", [])],
)
def test_bash_completes_whole_words_where_an_equals_sign_divides_none(
    typed: str, offered: list[str], tmp_path: Path
) -> None:
    """As behind Hydra's completion: the field stays, and a value without choices is a file's name."""
    (tmp_path / "mine").touch()
    install = f'eval "$({sys.executable} -m tools --shell-completion bash)"\nCOMP_WORDBREAKS=" "\n'
    line = f'COMP_LINE="python -m tools.consolidate RUN {typed}"; COMP_POINT=${{#COMP_LINE}}; _complete_tools\n'
    script = f"{install}{line}printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (offered, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash completes")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("python -m tools.co", ["tools.compare", "tools.consolidate", "tools.coordinate_check"]),
        ("python -m studies.s", ["studies.status", "studies.surgery"]),
        ("python -m tools ru", ["runs"]),
        ("python -m tools.consolidate RUN ch", ["checkpoint=last", "checkpoint=best"]),
        ("python -m tools consolidate RUN checkpoint=b", ["best"]),
        ("python -m tools.runs so", ["sort="]),
        ("python -m tools.propagation all", ["all_rows=true", "all_rows=false"]),
        ("python -m tools.prepare input=x form", [f"format={name}" for name in ("auto", "text", "json", "parquet")]),
        ("python -m tools.plan mf", ["mfu="]),
        ("python -m tools.plan logger=w", ["wandb"]),
        ("python -m tools.compare RUN output=", []),
        ("python -m studies.run study=de", ["depth"]),
        ("python -m tools.compare nonsense", []),
        ("python train.py optim.l", ["from_before"]),
        ("python -m pytest te", ["from_before"]),
    ],
)
def test_bash_completes_names_fields_and_choices(typed: str, offered: list[str], tmp_path: Path) -> None:
    """By the function that bash would call; `=` divides words there, so that of a field only the value is left."""
    install = f'eval "$({sys.executable} -m tools --shell-completion bash)"\n'
    line = f'COMP_LINE="{typed}"; COMP_POINT=${{#COMP_LINE}}; _complete_tools\n'
    script = f"{BEFORE}{install}{install}{line}printf '%s\\n' \"${{COMPREPLY[@]}}\"; complete -p python"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stderr == ""
    *found, rule = done.stdout.splitlines()
    assert [word for word in found if word] == offered
    assert rule == "complete -o default -F _complete_tools python"
