"""A placement, norm, init and schedule of the user's own, by import path: trained, resumed, opened, exported, loaded.

The file has what docs/own_pieces.md shows in several, and a helper beside it.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core.cli import run as command_line
from core.errors import InvalidValue
from core.open_run import open_run
from lightning_modules.initialization import initialize
from lightning_modules.transformer import Transformer
from tests.support.models import tiny_config
from tests.support.own_pieces import pieces
from tests.support.runs import scalars, tiny_job, train
from tools import evaluate, export, generate, propagation

OWN = ("model.placement=my_norms.HalfNorm", "model.norm=my_norms.ScaleOnly", "model.norm_options={start: 0.5}")
ALLOW = "allow=my_norms.HalfNorm,my_norms.ScaleOnly,my_norms.halving"
EXTRA = """

def halving(config, num_steps):
    return lambda step: FACTOR ** step


class Forgetful(HalfNorm):
    def __init__(self, depth, norm):
        super().__init__()


def absent(dim):
    return nn.Missing(dim)


def slipped(num_layers):
    return lambda matrix: 1 / matrix.fan
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the user starts from, with a run of 4 steps, and one of 2 that was resumed to 4."""
    folder = tmp_path_factory.mktemp("home")
    source = "\n".join(pieces()[f"my_{piece}.py"] for piece in ("placement", "norm", "init"))
    source = source.replace("my_init.", "my_norms.")
    source = source.replace(
        "from spannorm import Init", "from my_helper import (\n    FACTOR,\n)\nfrom spannorm import Init"
    )
    (folder / "my_norms.py").write_text(source + EXTRA)
    (folder / "my_helper.py").write_text("import math\n\nFACTOR = math.sqrt(0.25)\n")
    job = [*tiny_job("optim.schedule=my_norms.halving", "optim.lr=1e-2"), *OWN]
    for name, steps in (("whole", 4), ("resumed", 2), ("resumed", 4)):
        more = ["ckpt_path=last"] if (folder / name).exists() else []
        ended = train(folder, *job, f"trainer.max_steps={steps}", f"run_dir={name}", *more)
        assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(home)
    yield home
    forget()


def forget() -> None:
    for name in ("my_norms", "my_helper"):
        sys.modules.pop(name, None)


def test_it_trains_by_its_own_equation_norm_init_and_schedule(at_home: Path) -> None:
    config = tiny_config(placement="my_norms.HalfNorm", norm="my_norms.ScaleOnly", norm_options={"start": 0.5})
    model = Transformer(config, 50)
    assert {type(model.blocks[0].placement.norm_ffn).__name__, type(model.blocks[1].placement.final_norm).__name__} == {
        "ScaleOnly"
    }
    assert model.blocks[0].placement.norm_attn.weight.tolist() == [0.5] * 32
    block, x = model.blocks[1].placement, torch.randn(2, 3, 32)
    torch.testing.assert_close(block(x, lambda x: 2 * x, lambda x: 4 * x), 2 * x + 2 * x)
    saved = torch.load(at_home / "whole/checkpoints/last.ckpt", weights_only=True)
    assert saved["state_dict"]["model.blocks.0.attn.o_proj.weight"].std() < 0.02, "small draws these with 0.01 / 2"
    rates = scalars(at_home / "whole", "optim/lr")
    assert list(rates.values()) == pytest.approx([5e-3, 1e-2, 2.5e-3, 1.25e-3]), "two steps of warm-up, then halving"


def test_it_is_resumed_to_the_curve_of_a_run_that_was_not_stopped(home: Path) -> None:
    whole, resumed = (scalars(home / name, "train/loss") for name in ("whole", "resumed"))
    assert len(whole) == 4
    assert whole == resumed


def test_it_is_opened_with_allow_alone(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for tool in (generate, evaluate):
        with pytest.raises(SystemExit, match="2"):
            command_line(lambda tool=tool: tool.main(["whole"]))  # type: ignore[misc]
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "my_norms.HalfNorm' is not valid: the saved configuration names code that is not this project's" in said
        assert ALLOW in said, "the line says how"
        assert "my_norms" not in sys.modules
    with pytest.raises(InvalidValue, match=r"my_norms\.ScaleOnly"):
        open_run(at_home / "whole", allow=["my_norms.HalfNorm"])
    evaluate.main(["whole", ALLOW])
    generate.main(["whole", "prompt=def", "num_tokens=3", ALLOW])
    reported = json.loads((at_home / "whole/summary.json").read_text())["val_loss"]
    assert f"{reported:.3f}"[:4] in capsys.readouterr().out


def test_its_signal_is_measured(at_home: Path) -> None:
    result = propagation.report(
        ["model.placement=my_norms.HalfNorm", "model.num_layers=2", "model.dim=32", "model.num_heads=2"]
    )
    assert result.init == "my_norms.small"
    assert result.predictions is None


@pytest.mark.usefixtures("hub_modules")
def test_it_is_exported_with_its_files_and_loads_without_them(at_home: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export.main(["whole", f"output={tmp_path / 'out'}", ALLOW])
    batch = torch.randint(257, (2, 16))
    expected = open_run(at_home / "whole", allow=ALLOW.removeprefix("allow=").split(",")).module(batch)[0].detach()
    forget()
    sys.path.remove(str(at_home))
    try:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
        torch.testing.assert_close(theirs(batch).logits.detach(), expected, atol=1e-5, rtol=1e-5)
        assert "my_norms" not in sys.modules, "the copy in the folder is what was loaded"
    finally:
        sys.path.insert(0, str(at_home))
    assert (tmp_path / "out/my_helper.py").read_text() == (at_home / "my_helper.py").read_text()
    files = {path.name for path in (tmp_path / "out").glob("*.py")}
    assert files == {"modeling_placement.py", "spannorm.py", "my_norms.py", "my_helper.py"}


def test_what_own_code_raises_is_said_with_its_line(at_home: Path) -> None:
    lines = (at_home / "my_norms.py").read_text().splitlines()
    for fields, slip in (
        ({"placement": "my_norms.Forgetful"}, "super().__init__()"),
        ({"norm": "my_norms.absent"}, "return nn.Missing(dim)"),
        ({"init": "my_norms.slipped"}, "return lambda matrix: 1 / matrix.fan"),
    ):
        number = max(n for n, line in enumerate(lines, start=1) if line.strip() == slip)
        with pytest.raises(InvalidValue, match=rf"it raises \w+Error: .* \(my_norms.py, line {number}\)$") as caught:
            initialize(Transformer(tiny_config(**fields), 50))
        assert caught.value.field == f"model.{next(iter(fields))}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.placement=my_norms.Halfnorm", "model.placement='my_norms.Halfnorm' is not valid: expected a class or"),
        ("model.placement=my_norms.small", "model.placement='my_norms.small' is not valid: expected a subclass of"),
        ("model.norm=nowhere.Norm", "model.norm='nowhere.Norm' is not valid: expected a class or function that can be"),
        ("model.norm_options={stat: 1}", "model.norm_options.stat=1 is not valid: no such field; one of start"),
        ("model.norm_options={start: a}", "model.norm_options.start='a' is not valid: expected a number"),
        (
            "model.init=my_norms.HalfNorm",
            "model.init='my_norms.HalfNorm' is not valid: expected a function of num_layers",
        ),
        (
            "model.placement=my_norms.Forgetful",
            "model.placement='my_norms.Forgetful' is not valid: it raises TypeError:",
        ),
        (
            "model.init=my_norms.slipped",
            "model.init='my_norms.slipped' is not valid: it raises AttributeError: 'Matrix'",
        ),
        ("optim.schedule=my_norms.nothing", "optim.schedule='my_norms.nothing' is not valid: expected a class or"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line_and_nothing_is_written(
    at_home: Path, override: str, message: str
) -> None:
    ended = train(at_home, *tiny_job(*OWN, override), "run_dir=wrong")
    assert ended.code == 2
    assert ended.err.startswith(f"Error: {message}")
    assert ended.err.count("\n") == 1
    assert not (at_home / "wrong").exists()
