"""The files beside the code: licence, citation, changelog, container. They name the versions that are installed."""

import json
import re
import tomllib

import yaml

from tests.support.runs import ROOT

PINNED = re.compile(r"^([\w.-]+)==([\w.]+)", re.MULTILINE)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(*names: str) -> dict[str, str]:
    return {name: version for file in names for name, version in PINNED.findall((ROOT / file).read_text())}


def test_the_citation_is_of_this_version_and_refers_to_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys(), "what the format requires"
    assert (citation["title"], citation["version"]) == (f"{PROJECT['name']}-suite", PROJECT["version"])
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert [item["value"] for item in citation["references"][0]["identifiers"]] == ["arXiv:2601.22580"]


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert [int(number) for number in re.findall(r"^   (\d)\. ", text, re.MULTILINE)] == list(range(1, 10))
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_changelog_has_this_version_and_what_is_not_released() -> None:
    sections = re.findall(r"^## \[?([\w.]+)\]?", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert PROJECT["version"] in sections


def test_the_container_installs_what_is_pinned_and_builds_megablocks_by_its_tool() -> None:
    """It cannot be built on a machine without Docker and a registry: hadolint and this are what is tested."""
    text = (ROOT / "Dockerfile").read_text()
    copied = [source for line in re.findall(r"^COPY (.*) \./\w*/?$", text, re.MULTILINE) for source in line.split()]
    assert {"requirements-build.txt", "requirements-megablocks.txt", "core", "tools/megablocks.py"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert {name for name in copied if name.startswith("requirements-m")} == {"requirements-megablocks.txt"}
    built = text.index("python -m tools.megablocks")
    assert all(text.index(name) < built for name in copied)
    assert re.search(r"^ARG TORCH_CUDA_ARCH_LIST=", text[:built], re.MULTILINE), "no GPU is seen while it is built"


def test_the_devcontainer_is_that_container() -> None:
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert container["overrideCommand"], "the image's own command is train.py"
    assert (ROOT / container["postCreateCommand"].split()[-1]).is_file()
