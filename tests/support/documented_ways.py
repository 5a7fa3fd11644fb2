"""How each command of the documentation is tried out; the first pattern of WAYS that matches decides.

A new command of a kind that is here already is run as it is. One of another kind needs a line in WAYS: a pattern, and
`trains`, `calls`, `composes`, `parses`, `reads`, `helps`, `plans` or `listed`, of which all but the first two say why
the command is not run.
"""

import contextlib
import io
import itertools
import os
import random
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from hydra import compose, initialize_config_dir

from core import cli
from core.dataclass_cli import parse_fields
from lightning_modules.composing import register_schemas
from tests.support.documented_commands import Command
from tests.support.images import samples, write_shard
from tests.support.own_pieces import write_pieces
from tests.support.runs import ROOT, run, tiny_job, train
from tools.evaluate import EvaluateConfig
from tools.plan import PlanConfig

Way = Callable[[Command, Path], None]
"""Tries a command in a working folder, and raises where it is wrong."""

RUN = "runs/moe_spannorm/a"
SHARED = ("data.root=", "data.seq_len=", "data.batch_size=", "data.val_batches=")


def trains(**replaced: str) -> Way:
    """Through train.py, for one or two steps of a tiny model.

    Args:
        replaced: other values for fields of the command, `__` for a dot.
    """

    def way(command: Command, cwd: Path) -> None:
        arguments = _replace(command.arguments, replaced)
        own_data = any(argument.startswith("data=") for argument in arguments)
        experiment = [argument for argument in arguments if argument.startswith("experiment=")]
        tiny = [override for override in tiny_job(*experiment) if override not in experiment]
        tiny = [override for override in tiny if not (own_data and override.startswith(SHARED))]
        if any(argument.startswith("callbacks=") for argument in arguments):  # which may be without that one
            tiny.remove("callbacks.text_sample=null")
        steps = "trainer.max_steps=2"
        if "ckpt_path=last" in arguments:
            steps = "trainer.max_steps=3"
            begun = train(cwd, *(word for word in arguments if word != "ckpt_path=last"), *tiny, "trainer.max_steps=1")
            assert begun.code in (0, None), begun.err
        finished = train(cwd, *arguments, *tiny, steps)
        assert finished.code in (0, None), finished.err

    return way


def composes(reason: str) -> Way:
    """Only the configuration, which knows every field: training would need what is not here."""

    def way(command: Command, cwd: Path) -> None:
        assert reason
        register_schemas()
        plans_it = "-m tools.plan" in command.text
        given = parse_fields(PlanConfig, command.arguments).overrides if plans_it else command.arguments
        overrides = [argument for argument in given if argument[0] not in "-$"]
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            compose("train", [re.sub(r"\$\w+", "x", override) for override in overrides])

    return way


def calls(*more: str, **replaced: str) -> Way:
    """A tool, in this process.

    Args:
        more: further arguments.
        replaced: other values for `FIELD=VALUE` arguments.
    """

    def way(command: Command, cwd: Path) -> None:
        named = dict.fromkeys(word for word in command.arguments if re.match(r"RUN\d?$|runs/", word))
        run_of = {word: f"{RUN}{number or ''}" for number, word in enumerate(named)}
        for folder in list(run_of.values())[1:]:
            shutil.copytree(cwd / RUN, cwd / folder)
        arguments = [run_of.get(word, word) for word in command.arguments]
        code, out = _call(command, cwd, [*_replace(arguments, replaced), *more])
        assert code in (0, None), out

    return way


class Parsed(Exception):
    """A command took its arguments."""


def parses(reason: str) -> Way:
    """Only the arguments, by the command's own parser: it is left when it has taken them."""

    def parse(schema: type, arguments: list[str]) -> None:
        parse_fields(schema, arguments)
        raise Parsed

    def way(command: Command, cwd: Path) -> None:
        assert reason
        with mock.patch.object(cli, "parse_fields", parse):
            try:
                _, out = _call(command, cwd, command.arguments)
            except Parsed:
                return
        raise AssertionError(out)

    return way


def reads(reason: str) -> Way:
    """Only the fields of tools.evaluate; its tasks must be among those of tools/evaluation/tasks."""

    def way(command: Command, cwd: Path) -> None:
        assert reason
        config = parse_fields(EvaluateConfig, command.arguments)
        assert set(config.tasks) <= {path.stem for path in (ROOT / "tools/evaluation/tasks").rglob("*.yaml")}, (
            config.tasks
        )

    return way


def helps(reason: str) -> Way:
    """Asks for --help only, which must know every option of the command."""

    def way(command: Command, cwd: Path) -> None:
        assert reason
        code, out = _call(command, cwd, ["--help"])
        assert code in (0, None), out
        for word in command.arguments:
            assert not word.startswith("--") or word == "--help" or word.split("=")[0] in out, word

    return way


def plans(reason: str) -> Way:
    """Lays the grid of a study out, and runs none of it; rates that another study is to select are 1e-3."""

    def way(command: Command, cwd: Path) -> None:
        from studies.plan import planned

        assert reason
        with contextlib.chdir(cwd), mock.patch("studies.plan.selected_rates", return_value=[({}, 1e-3)]):
            study, *_ = planned([word for word in command.arguments if "=" in word])
        assert len(list(study.runs())) > 1

    return way


def listed(reason: str) -> Way:
    """Only split as a shell would; what is to be installed from a file must name one that is here."""

    def way(command: Command, cwd: Path) -> None:
        assert reason
        words = command.words
        assert words
        for flag, name in itertools.pairwise(words):
            assert flag != "-r" or (ROOT / name).is_file(), name

    return way


def makes(command: Command, cwd: Path) -> None:
    """Looks for the target only: what it does is what the tests are run by."""
    target = next(word for word in command.words[1:] if "=" not in word)
    assert re.search(rf"^{re.escape(target)}:.*##", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def _replace(arguments: list[str], replaced: dict[str, str]) -> list[str]:
    fields = {name.replace("__", "."): value for name, value in replaced.items()}
    names = [argument.partition("=")[0] for argument in arguments]
    return [f"{n}={fields[n]}" if n in fields else argument for n, argument in zip(names, arguments, strict=True)]


def _call(command: Command, cwd: Path, arguments: list[str]) -> tuple[object, str]:
    """Exit code, and all that was printed, of a script or module of the repository."""
    words, out = command.words, io.StringIO()
    path = ROOT / (words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1])
    path = path.with_suffix("") / "__main__.py" if path.with_suffix("").is_dir() else path
    assert path.is_file(), f"{path.relative_to(ROOT)} is not here"
    with (
        contextlib.chdir(cwd),
        mock.patch.object(sys, "argv", [str(path), *arguments]),
        mock.patch.object(sys, "path", [*sys.path]),
        mock.patch.dict(os.environ, {"COLUMNS": "200"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        started = f"tools.{arguments[0]}" if path.name == "__main__.py" and arguments else ""
        imported = sys.modules.pop(started, None)  # by another test; runpy warns of it
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as leaving:
            return leaving.code, out.getvalue()
        finally:
            if imported is not None:
                sys.modules[started] = imported
    return 0, out.getvalue()


def prepare(cwd: Path) -> None:
    """What the commands count on: texts, corpora made of them, and runs."""
    for number, folder in enumerate(["texts", "code"] * 60):
        (cwd / folder).mkdir(exist_ok=True)
        (cwd / f"{folder}/{number // 2}.txt").write_text(random.Random(number).randbytes(1500).hex())
    write_pieces(cwd)
    tool = Command("", 0, "python -m tools.prepare")
    for name, given, tokenizer in (
        ("texts", "texts", "byte"),
        ("code", "code", "byte"),
        ("stdlib-bpe", "texts", "bpe:300"),
    ):
        code, out = _call(tool, cwd, [f"input={given}/", f"tokenizer={tokenizer}", f"output=data/{name}"])
        assert code in (0, None), out
    for number in range(11):
        write_shard(cwd / f"shards/{number:03d}.tar", samples(0, 7 if number < 10 else 64))
    run(cwd, RUN, "experiment=moe_spannorm")


TINY_MODEL = ("model.num_layers=2", "model.dim=32", "model.num_heads=2", "model.ffn_dim=48")
GPU, LONG = "needs a GPU", "takes minutes"
WAYS: list[tuple[str, Way]] = [
    (r"python train\.py (--help|--cfg|--shell-completion)", helps("tests/test_cli.py asks for it")),
    (r"python train\.py .*\$balancing", trains(model__moe__balancing="bias", run_dir="balanced")),
    (r"(torchrun|srun) .*train\.py", composes("needs several machines")),
    (r"python (train\.py|-m tools\.plan) .*(_7b|_gpu|trainer=gpu|=megablocks|bf16)", composes(GPU)),
    (r"python train\.py .*(trainer=(ddp|fsdp|slurm)|trainer\.devices=)", composes("tests/distributed runs several")),
    (r"python train\.py .*\w+://", composes("needs a network; tests/datamodules reads such a corpus")),
    (r"python train\.py .*data=hf_images", composes("needs a network; tests/datamodules/images reads such a dataset")),
    (r"python train\.py .*data=hf\b", composes("needs a network; tests/datamodules/test_hub_text.py reads a folder")),
    (r"python CHECKOUT/train\.py ", composes("tests/test_own_pieces.py starts it from elsewhere")),
    (r"PYTHONPATH=CHECKOUT ", parses("tests/test_own_pieces.py starts it from elsewhere")),
    (r"python train\.py .*schedule=wsd", composes("two steps have no room for its decay; test_optim.py trains it")),
    (r"python train\.py .*bitsandbytes", composes("the package is not ours")),
    (
        r"python train\.py .*init_from=",
        composes("tests/lightning_modules/test_warm_start.py and tests/tools/test_import.py train from such"),
    ),
    (r"python train\.py .*hydra/sweeper=optuna", listed("tests/test_sweeps.py runs it where Optuna is installed")),
    (r"python train\.py .*launcher\.n_jobs=2", trains(hydra__launcher__n_jobs="1")),  # tests/test_sweeps.py has two
    (r"python train\.py", trains()),
    (r"python examples/own_model\.py", listed("tests/spannorm/test_installed.py trains it")),
    (r"python -m tools\.prepare inspect", calls()),
    (r"python -m tools\.prepare .*=models/", parses("tests/datamodules/test_tokenizer_folder.py prepares with one")),
    (r"python -m tools\.prepare input=texts/ ", calls(output="data/again")),
    (r"python -m tools\.prepare input=python_stdlib", calls(input="texts/", tokenizer="bpe:300", output="data/bpe")),
    (r"python -m tools\.prepare input='?(hf:|logs)", listed("needs a network; tests/datamodules prepares such input")),
    (r"python -m tools\.compare .*\{", parses("its runs took hours")),
    (r"python -m tools\.compare .*outcomes=", parses("tests/tools/test_anatomy.py measures some")),
    (r"python -m tools\.compare", calls()),
    (r"python -m tools\.anatomy", parses("tests/tools/test_anatomy.py writes reports")),
    (r"python -m tools\.runs", calls()),
    (
        r"python -m tools\.(import|(propagation|plan) init_from=)",
        parses("tests/tools/test_import.py has such a folder"),
    ),
    (r"python -m tools\.propagation", calls(*TINY_MODEL)),
    (r"python -m tools( |$)", calls()),
    (r"python -m tools\.replay", parses("tests/tools/test_replay.py replays a run that went wrong")),
    (r"python -m tools\.evaluate .*tasks=(?!offline)", reads("their data needs a network")),
    (r"python -m tools\.(generate|evaluate|export|consolidate)", calls()),
    (r"python -m tools\.", parses(LONG)),
    (r"python -m studies\.(run|status)", plans("tests/studies runs a study")),
    (r"python -m studies\.report", parses("tests/studies/test_report.py reports on records")),
    (r"python -m studies\.surgery", parses("tests/studies/test_surgery.py tries some placements")),
    (r"python -m benchmarks\.", parses(LONG)),
    (r"python -m pytest", listed("we are in it")),
    (r"python -c ", listed("asks whether a package that is built for CUDA is there")),
    (r"make ", makes),
    (r"mkdocs build$", listed("make docs does")),
    (r"(pip|git|source|export|tar|sed|docker) ", listed("changes the environment")),
    (r"(tensorboard|chromium) ", listed("shows a page until it is ended")),
    (r"eval ", listed("tests/test_terminal.py completes overrides")),
    (r"for \w+ in .*; do$|done$|\w+=\S*$|\[ ", listed("the script around commands that are tried")),
]


def way_of(command: Command) -> Way | None:
    """How a command is tried; None: nobody has said."""
    return next((way for pattern, way in WAYS if re.match(pattern, command.text)), None)
