"""CONTRIBUTING.md is followed to the letter, and docs/placements.md says what the classes say."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

from lightning_modules.initialization import INITS
from lightning_modules.placements.registry import PLACEMENTS
from tests.conftest import make_module, tokens
from tests.lightning_modules.placements.schemes import SCHEMES

ROOT = Path(__file__).parents[3]


def sections(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", path.read_text(), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_the_placement_of_contributing_trains(ffn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = sections(ROOT / "CONTRIBUTING.md")["Add a placement"]
    path = re.search(r"`(lightning_modules/placements/.*)\.py`:", section)
    source, registry = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert path is not None
    assert len([line for line in (source + registry).splitlines() if line]) == 10

    file, name = tmp_path / "placement.py", path[1].replace("/", ".")
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    monkeypatch.setitem(sys.modules, name, module)
    statement, entry = registry.split("\n\n")
    exec(statement, namespace := {})
    ((placement, scheme),) = eval(f"{{{entry.strip()}}}", namespace).items()
    assert placement not in PLACEMENTS
    monkeypatch.setitem(PLACEMENTS, placement, scheme)

    model = make_module(placement=placement, ffn=ffn)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch, losses = {"tokens": tokens(4, 17)}, []
    for _ in range(5):
        loss, _ = model._loss(batch)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_every_placement_has_its_section_and_no_other_has_one() -> None:
    documented = [title for title in sections(ROOT / "docs/placements.md") if title in PLACEMENTS or title.islower()]
    assert documented == list(PLACEMENTS)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_its_section_tells_equation_diagram_source_init_norms_and_options(name: str) -> None:
    scheme, text = PLACEMENTS[name], sections(ROOT / "docs/placements.md")[name]
    docstring = inspect.cleandoc(scheme.__doc__ or "")
    diagram = [line.rstrip() for line in docstring.splitlines() if re.search("[─│└]", line)]
    assert diagram
    assert "\n".join(diagram) in re.sub("\n\n+", "\n", text)
    equation, source = re.fullmatch(r"(.*)\.?   (\d{4}\.\d{5}).*", docstring.splitlines()[0]).groups()  # type: ignore[union-attr]
    assert equation.rstrip(".") in text
    assert f"[{source}](https://arxiv.org/abs/{source})" in text
    assert f"`init`: {scheme.default_init}" in text
    for kind in SCHEMES[name].refuses:
        assert kind in text.split("Refuses")[1]
    for option in list(inspect.signature(scheme).parameters)[3:]:
        assert f"`{option}`" in text


def test_the_help_lists_every_placement_and_init() -> None:
    words = re.split(r"[\s,;]+", (ROOT / "configs/train.yaml").read_text())
    assert {*PLACEMENTS, *INITS} <= set(words)
