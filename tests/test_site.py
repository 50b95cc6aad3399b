"""The site builds without a warning and without a network, and documents every public name."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import selfrepair_nn as sr
from selfrepair_nn.options import Options, flag

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, its demo a small store."""
    folder = tmp_path_factory.mktemp("site")
    store = folder / "demo.zarr"
    sr.run(
        "heads", model="tiny-neox", tokens=64, length=16, layers="7", check=False, out=store, progress=False
    )
    config = load_config(
        str(ROOT / "mkdocs.yml"), site_dir=str(folder / "site"), strict=True, extra={"demo": str(store)}
    )
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder / "site"


def test_every_public_name_is_documented_once(site):
    page = (site / "api.html").read_text()
    for name in sr.__all__:
        headings = re.findall(rf"<h3 id=\"[\w.]+\" class=\"doc doc-heading\">\s*sr\.{name}\b", page)
        assert len(headings) == 1, name
    for option in fields(Options):
        assert f"<code>{flag(option.name)}</code>" in page


def test_nothing_is_fetched_from_elsewhere(site):
    for path in site.rglob("*.html"):
        fetched = re.findall(
            r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?:[^\" >]+)", path.read_text()
        )
        assert not fetched, (path, fetched)


def test_formulas_are_rendered(site):
    page = (site / "definitions.html").read_text()
    assert page.count("<math") >= 8
    assert not re.search(r"\\(text|frac|sum|Delta|langle|mathrm)\b", page)
    assert "columnalign" in page


def test_the_demo_is_embedded(site):
    assert "demo-explorer.html" in (site / "demo.html").read_text()
    assert "tiny-neox" in (site / "demo-explorer.html").read_text()


def test_a_public_name_without_a_place_is_an_error(monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    monkeypatch.setattr(hooks, "public", lambda: {"thing": "selfrepair_nn.nowhere.thing"})
    with pytest.raises(hooks.PluginError, match="thing is public"):
        hooks.topics()
