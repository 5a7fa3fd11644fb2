"""docs/placements.md and the help say what the classes say, of every placement with an equation in SCHEMES."""

import inspect
import re
from pathlib import Path

import pytest

from spannorm import INITS, PLACEMENTS
from tests.support.schemes import SCHEMES

ROOT = Path(__file__).parents[3]


def sections(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", path.read_text(), re.MULTILINE | re.DOTALL))


def test_every_placement_with_an_equation_has_its_section_and_no_other_has_one() -> None:
    documented = [title for title in sections(ROOT / "docs/placements.md") if title in PLACEMENTS or title.islower()]
    assert documented == list(SCHEMES)


@pytest.mark.parametrize("name", SCHEMES)
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
    assert {*SCHEMES, *INITS} <= set(words)
