"""A hook of mkdocs that puts results/, which lies beside docs/, into the site.

In the repository a page of docs/ links to ../results/NAME.md, which readers of the repository can follow too. In the
site the same page is results/NAME.md. A page of results/ links to ../docs/NAME.md in the same way.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHOWN = (".md", ".png", ".json")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every page, picture and record of results/."""
    for path in sorted(RESULTS.rglob("*")):
        if path.suffix in SHOWN:
            uri = path.relative_to(RESULTS.parent).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links between docs/ and results/, which lie beside each other, point at the pages' places in the site."""
    return markdown.replace("](../results/", "](results/").replace("../docs/", "../")
