"""What the documents say of names, options and commands is what the code offers."""

from pathlib import Path

import pytest

from selfrepair_nn.cli import cli
from selfrepair_nn.figures import FIGURES
from selfrepair_nn.quantities import QUANTITIES, table
from selfrepair_nn.recipe import recipe_paths

ROOT = Path(__file__).parents[1]


def test_store_page_has_every_quantity_as_it_is_defined():
    """If it has not: python -c "from selfrepair_nn.quantities import table; print(table())" prints the table."""
    page = (ROOT / "docs" / "store.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert rows == table().splitlines()
    for q in QUANTITIES.values():
        row = f"| `{q.name}` | {', '.join(q.dims) or '–'} | {q.units} | {q.description} | "
        assert sum(line.startswith(row) for line in rows) == 1


@pytest.mark.parametrize("recipe", recipe_paths())
def test_readme_names_every_recipe(recipe):
    assert f"`{recipe}`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_readme_names_every_command(command):
    assert f"selfrepair {command}" in (ROOT / "README.md").read_text()


def test_readme_shows_the_recipe_as_it_is():
    shown = (ROOT / "README.md").read_text()
    lines = (ROOT / "recipes" / "heads.py").read_text().rstrip().splitlines()
    assert "\n".join(f"    {line}" if line else "" for line in lines) in shown


@pytest.mark.parametrize("name", [*FIGURES, "paper_comparison"])
def test_gallery_shows_every_figure_small_and_with_its_command(name):
    image = ROOT / "docs" / "figures" / f"{name}.png"
    assert image.stat().st_size < 200_000
    pages = [ROOT / "docs" / "gallery.md", *sorted((ROOT / "docs" / "gallery").glob("*.md"))]
    section = next(s for page in pages for s in page.read_text().split("\n## ") if image.name in s)
    assert f"--figure {name}\n" in section or "selfrepair compare-paper" in section


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    import re

    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        made = target in ("api.md", "demo-explorer.html")  # by docs/site.py
        assert made or target.startswith("http") or (page.parent / target).exists(), target


def test_the_recipe_with_a_figure_of_its_own_is_one_that_works(tmp_path):
    from made import any_store

    import selfrepair_nn as sr

    lines = (ROOT / "docs" / "recipes.md").read_text().split("as a map:\n\n")[1].split("\nRun it")[0]
    path = tmp_path / "pairs.py"
    path.write_text("\n".join(line.removeprefix("    ") for line in lines.splitlines()))
    assert {p.stem for p in sr.plot(any_store("pairs"), tmp_path, recipe=path)} == {"pair_map", "cases"}
    assert sr.plot(any_store("neurons"), tmp_path / "other", recipe=path)


def _rows(section: str) -> dict[str, str]:
    """What docs/models.md says of each model type in the table below a heading."""
    page = (ROOT / "docs" / "models.md").read_text()
    table = page.split(f"\n## {section}")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {model_type.strip("`"): said for types, said in rows for model_type in types.split(", ")}


def test_models_page_has_every_family_and_no_other():
    from selfrepair_nn.models.architectures import SUPPORTED

    assert sorted(_rows("Supported")) == sorted(SUPPORTED)


def test_models_page_has_every_refused_family_with_its_reason():
    from selfrepair_nn.models.architectures import SUPPORTED
    from selfrepair_nn.models.refused import REASONS

    assert _rows("Refused") == REASONS
    assert not set(REASONS) & set(SUPPORTED)


def test_models_page_tells_the_oldest_version_that_is_asked_for():
    asked = (ROOT / "pyproject.toml").read_text().split('"transformers>=')[1].split('"')[0]
    assert f"Tested with {asked}." in (ROOT / "docs" / "models.md").read_text()
