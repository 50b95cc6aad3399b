"""One version: the package's, and wherever else one is told."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import selfrepair_nn as sr

ROOT = Path(__file__).parents[1]


def test_every_place_tells_the_same_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert sr.__version__ == version("selfrepair_nn") == project["version"] == told == newest


def test_the_citation_names_the_package_and_the_paper():
    cited = (ROOT / "CITATION.cff").read_text()
    assert "title: selfrepair_nn" in cited
    assert "title: Explorations of Self-Repair in Language Models" in cited
    assert "Rushing" in cited
    assert "Nanda" in cited
