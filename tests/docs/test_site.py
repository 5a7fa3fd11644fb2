"""The documentation as a site: opened as files, by a real browser, as somebody does who has built it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.browser import CHROMIUM, WITHOUT, Browser
from tests.support.runs import ROOT


def build(folder: Path, pages: Mapping[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    """Build a site of a few pages into folder/site, by mkdocs.yml as it is but for the menu and the API's pages."""
    settings: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    settings |= {"docs_dir": "docs", "site_dir": "site", "nav": list(pages), "hooks": [], "not_in_nav": ""}
    settings["plugins"] = [plugin for plugin in settings["plugins"] if not isinstance(plugin, dict)]
    (folder / "docs").mkdir()
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    scripts = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.js")}
    for name, text in {**pages, **scripts}.items():
        (folder / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "docs" / name).write_text(text)
    command = [sys.executable, "-m", "mkdocs", *(flags or ["build"])]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=folder, env=environment, timeout=100, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    pages = {name: (ROOT / "docs" / name).read_text() for name in ("index.md", "theory.md")}
    built = build(folder, pages | {"results/walk.md": (ROOT / "results/walk.md").read_text()})
    assert built.returncode == 0, built.stderr
    return folder / "site"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as opened:
        yield opened


def test_pages_link_to_files_and_load_nothing_from_elsewhere(site: Path) -> None:
    menu = re.search(r'href="([^"]*theory[^"#]*)"', (site / "index.html").read_text())
    assert menu is not None
    assert (site / menu[1]).is_file(), "no folder, which a browser would list"
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="?([^">\s]+)', page.read_text())
        loaded += re.findall(r'<link[^>]* rel="?stylesheet"?[^>]* href="?([^">\s]+)', page.read_text())
        assert loaded
        assert [address for address in loaded if "//" in address] == []


@pytest.mark.parametrize("start", ["index.html", "results/walk.html"])
@pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)
def test_a_search_finds_a_page_from_the_files(site: Path, browser: Browser, start: str) -> None:
    with browser.open((site / start).as_uri()) as page:
        page.wait("document.readyState === 'complete'")
        page.run("document.querySelector('.md-search__input').focus()")
        page.enter(".md-search__input", "variance of branches")
        found = page.wait("[...document.querySelectorAll('a.md-search-result__link')].map(link => link.href)")
        assert (site / "theory.html").as_uri() in found
        page.click("a.md-search-result__link[href*='theory.html']")
        page.wait("document.title.startsWith('Signal propagation at initialization')")


def test_make_docs_fails_on_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (flags,) = re.findall(r"/mkdocs (build.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name, link, code in (("whole", "index.md", 0), ("broken", "nothing.md", 1)):
        (tmp_path / name).mkdir()
        built = build(tmp_path / name, {"index.md": f"# Title\n\n[there]({link})\n"}, *flags.split())
        assert (built.returncode, "nothing.md" in built.stderr) == (code, code == 1), built.stderr
