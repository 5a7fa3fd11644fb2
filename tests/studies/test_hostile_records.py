"""Records and studies from a stranger: read as data, refused or shown as text; nothing runs or leaves its folder."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown import markdown as render

from core.errors import UserError
from core.untrusted import Untrusted
from studies.decay import Decay
from studies.grid import Study
from studies.record import FINISHED, Record
from studies.report import load, write
from tests.support.runs import ROOT

SCRIPT = "<script>alert(1)</script>"
LINK = "[x](javascript:alert(1))"
EMBED = "![x](/etc/hostname.png)"
RAW = '<img src=x onerror="alert(1)"><iframe src="file:///etc/passwd">'
LINES = "a\n\n# heading\n\n| a | b |\x1b[31m\u202e"
FOREIGN = f"{SCRIPT} {LINK} {EMBED} {RAW} {LINES} {{: onclick=alert(1)}} `{SCRIPT}` https://x *a* _b_ $x^ \\"


def study(**changes: Any) -> Study:
    axes = {"model.placement": {"spannorm": ["a=1"], "prenorm": ["a=2"]}, "seed": {"x": [], "y": []}}
    content = {"name": "n", "scale": "s", "question": "Which?", "needs": "little", "axes": axes, "baseline": "prenorm"}
    return Study(**{**content, "seeds": (0, 1), "overrides": (), **changes})


def fill(root: Path, plan: Study, **changes: Any) -> None:
    """Write the study, and a record of each of its runs."""
    plan.save(root / "study.yaml")
    for run in plan.runs():
        content = {"name": run.name, "point": dict(run.point), "seed": run.seed, "overrides": list(run.overrides)}
        given = {**content, "status": FINISHED, "folder": "runs/x", "val_loss": 2.0 + run.seed, "parameters": 1000}
        given |= {"seconds": 1.0, "train_loss": ([0, 1], [3.0, 2.0])}
        given["by_block"] = {"signal/block_{}/variance": {"0": {"1": 1.0, "2": 2.0}}}
        Record(**{**given, **changes}).save(root / f"{run.name}.json")


CANARIES = (
    "+module.x._target_=os.mkdir,+module.x._args_=[{canary}]",
    "+module.x._target_=pathlib.Path.write_text,+module.x._args_=[{canary},x]",
    "+data._target_=subprocess.call,+data._args_=[[touch,{canary}]]",
    "hydra.searchpath=[file://{canary}]",
    "+x=${{oc.env:HOME}}",
)


def test_what_a_record_names_is_never_run(tmp_path: Path) -> None:
    """By the command line, in a process that would import what a model is made of only if it built one."""
    canary, folder = tmp_path / "canary", tmp_path / "records"
    named = {
        str(number): [part if part.startswith("+") else f"+{part}" for part in text.format(canary=canary).split(",+")]
        for number, text in enumerate(CANARIES)
    }
    fill(folder, study(axes={"model.placement": named, "seed": {"x": [], "y": []}}, baseline="0"))
    code = "import sys; from studies.report import main; main(); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    assert not canary.exists()
    assert ended.stdout.splitlines()[-1] == "False", "no model was built"
    assert "20 runs are planned (model.placement x seed x 2 seeds); 20 have ended" in (folder / "report.md").read_text()


class Tags(HTMLParser):
    """Every tag of a page, with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


KNOWN = {
    "html",
    "meta",
    "title",
    "style",
    "h1",
    "h2",
    "p",
    "a",
    "code",
    "strong",
    "ul",
    "li",
    "img",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
}


def assert_inert(page: str) -> None:
    for tag, attributes in Tags(page).tags:
        assert tag in KNOWN
        assert set(attributes) <= {"href", "src", "alt", "id", "content", "charset", "http-equiv", "lang"}
        assert not re.match(r"\s*[a-z]+:", attributes.get("href") or "", re.I)
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")


def test_foreign_text_is_text_in_both_reports(tmp_path: Path, undrawn: None) -> None:
    """In every field that is free text, in labels and names; read back by a parser of HTML and one of Markdown."""
    axes = {FOREIGN[:190]: {FOREIGN[-190:]: ["a=1"], "b": ["a=2"]}, "[/x] $\\frac{": {"_" + SCRIPT: [], LINK: []}}
    plan = study(name=SCRIPT, scale=LINK, question=FOREIGN, needs=FOREIGN[:900], axes=axes, baseline="b")
    plan = Study(**{**vars(plan), "overrides": (FOREIGN,)})
    fill(tmp_path, plan, reason=FOREIGN, status="broken", folder="javascript:alert(1)", decay=Decay([1.0], [1.0]))
    write(tmp_path)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert_inert(page)
    pictures = re.findall(r"^!\[.*\]\((.*)\)$", text, re.M)
    assert page.count("<img") == len(pictures) == 7
    policy = next(attributes["content"] for tag, attributes in Tags(page).tags if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert SCRIPT not in page
    assert "\x1b" not in page + text
    assert "\u202e" not in page + text

    rendered = Tags(render(text, extensions=["tables", "attr_list"])).tags
    assert {tag for tag, _ in rendered} <= KNOWN
    assert [a["src"] for tag, a in rendered if tag == "img"] == pictures
    for _, attributes in rendered:
        assert set(attributes) <= {"href", "src", "alt"}
        assert not re.match(r"[a-z]+:", attributes.get("href") or "")


def test_a_report_shows_and_overwrites_only_what_is_in_its_folder(tmp_path: Path, undrawn: None) -> None:
    """A folder whose future files are links to the user's own: the links go, what they led to stays."""
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    folder = tmp_path / "records"
    fill(folder, study())
    for name in ("map.png", "report.md", "report.html", "trend.png.unfinished", "report.html.unfinished"):
        (folder / name).symlink_to(mine)
    write(folder)
    assert mine.read_text() == "mine"
    assert not (folder / "report.md").is_symlink()
    assert "mine" not in (folder / "report.html").read_text()


def odd(**changes: Any) -> dict[str, Any]:
    return {
        "name": "spannorm_x_seed0",
        "point": {"model.placement": "spannorm", "seed": "x"},
        "seed": 0,
        "overrides": ["a=1"],
        "status": "finished",
        "folder": "x",
        **changes,
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (odd(val_loss="x"), "val_loss='x'"),
        (odd(val_loss=1e300), "val_loss=1e+300"),
        (odd(val_loss=float("nan")), "val_loss=nan"),
        (odd(seed=True), "seed=True"),
        (odd(parameters=2**70), "parameters="),
        (odd(status="better"), "status='better'"),
        (odd(name="../../x"), "name='../../x'"),
        (odd(name="other"), "is the record of another run"),
        (odd(point={"model.placement": "prenorm", "seed": "x"}), "is the record of another run"),
        (odd(train_loss=[[0], []]), "different lengths"),
        (odd(train_loss=[[0], ["x"]]), "train_loss.1.0='x'"),
        (odd(train_loss=3), "train_loss=3"),
        (odd(by_block={"signal/block_{}/variance": {"0": {"0": 1.0}}}), "by_block"),
        (odd(by_block={"signal/block_{}/variance": {"0": {}}}), "by_block"),
        (odd(by_block={"signal/block_{}/variance": {"x": {"1": 1.0}}}), "by_block"),
        (odd(decay={"measured": []}), "decay"),
        (odd(overrides="x"), "overrides='x'"),
        (odd(more=1), "more=1"),
        ({}, "name: Field required"),
        ([], "Input should be an object"),
        (json.loads("[" * 900 + "]" * 900), "nested more than 200 levels deep"),
        ("[" * 5000 + "]" * 5000, "nested more than 200 levels deep"),
        ('{"name": "spann', "EOF while parsing"),
        ("\ufeff{}", "cannot be read"),
        (" " * (5 << 20), "has more than 4,194,304 bytes; the bound is 4,194,304, and READ_LIMITS=10"),
        (None, "is no regular file"),
    ],
)
def test_an_odd_record_is_left_out_and_said(
    tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str], content: Any, reason: str
) -> None:
    fill(tmp_path, study())
    path = tmp_path / "spannorm_x_seed0.json"
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    _, records, unfinished = load(tmp_path)
    assert len(records) == 7
    assert reason in unfinished["spannorm_x_seed0"]
    if content in ({}, None):
        write(tmp_path)
        assert "Half written, and left out: spannorm_x_seed0" in (tmp_path / "report.md").read_text()
        assert capsys.readouterr().err.startswith("Left out: spannorm_x_seed0: ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [-1]}, "seeds.0=-1"),
        ({"seeds": [0.5]}, "seeds.0=0.5"),
        ({"axes": {}}, "axes"),
        ({"axes": {"a": {}}}, "axes.a"),
        ({"axes": {"a": ["x"]}}, "axes.a"),
        ({"axes": {f"a{i}": {str(j): [] for j in range(9)} for i in range(8)}}, "plans 86,093,442 runs; the bound is"),
        ({"axes": {"a": {"x" * 300: []}}}, "axes"),
        ({"baseline": "x"}, "baseline='x' is no label"),
        ({"question": 3}, "question=3"),
        ({"name": None}, "name=None"),
        ({"more": 1}, "more=1"),
    ],
)
def test_an_odd_study_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = tmp_path / "study.yaml"
    study().save(path)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(Untrusted, match=re.escape(str(path))) as error:
        load(tmp_path)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["name: 2001-01-01", "name: !!binary aGk=", "!!set {a}", "- a", "3", "a: &a [*a]", ""])
def test_yaml_that_is_no_study_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "study.yaml"))):
        load(tmp_path)


@pytest.mark.slow
def test_numbers_that_no_scale_holds_are_drawn_without(tmp_path: Path) -> None:
    huge = [1e308, -1e308, float("inf"), float("nan"), 0.0, 5e-324]
    tags = ("signal/block_{}/variance", "representation/block_{}/token_cosine", "gradients/block_{}/all")
    blocks = {tag: {"0": {str(i + 1): x for i, x in enumerate(huge)}, "9": {"1": 1e308}} for tag in tags}
    fill(
        tmp_path, study(), train_loss=(list(range(6)), huge), by_block=blocks, decay=Decay(huge, huge[:2]), val_loss=1e9
    )
    write(tmp_path)
    assert_inert((tmp_path / "report.html").read_text())


@pytest.mark.parametrize(
    ("rows", "columns", "pictures"),
    [(9, 100, "Of 100 pictures the first 12 are drawn."), (11, 100, "not drawn, as the")],
)
def test_the_pictures_of_a_large_study_are_bounded(
    tmp_path: Path, undrawn: None, rows: int, columns: int, pictures: str
) -> None:
    axes = {"a": {"x" * 190 + str(i): [] for i in range(rows)}, "b": {"y" * 190 + str(i): [] for i in range(columns)}}
    study(axes=axes, baseline=None, seeds=(0,)).save(tmp_path / "study.yaml")
    write(tmp_path)
    assert pictures in (tmp_path / "report.md").read_text()
    assert len(list(tmp_path.glob("*.png"))) == (15 if rows == 9 else 0)


def test_a_report_can_go_elsewhere_and_says_where_it_cannot(tmp_path: Path, undrawn: None) -> None:
    fill(tmp_path / "records", study())
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/map.png could not be written \(File exists\)"):
        write(tmp_path / "records", tmp_path / "file")
    report = write(tmp_path / "records", tmp_path / "elsewhere")
    assert "](../records/spannorm_x_seed0.json)" in report.read_text()
    (tmp_path / "file").unlink()
    ours = (path for path in tmp_path.rglob("*") if "elsewhere" not in path.parts)
    assert sorted(ours) == before
