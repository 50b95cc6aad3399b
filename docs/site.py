"""What the site has beside its pages: formulas as MathML, the reference of public names, the explorer of the demo."""

import ast
import re
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
EXPLORER = "demo-explorer.html"
PAGES = {
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "training/README.md": "training.md",
}
"""Pages that stand elsewhere in the source."""
OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:(?:\.\./)+|(?=docs/))([\w./-]+)(#[\w-]+)?\)")
FORMULAS = ("definitions.md", "engine.md")
INLINE = re.compile(r"(?<![\\$`\w])\$(?![\s(])([^$\n`]+?)\$")
TOPICS = {
    "Run": ("run", "audit", "preview", "Options", "load", "wrap", "check", "list_recipes"),
    "Look": ("summary", "plot", "view", "write_report", "figure", "compare_paper"),
    "Read stores": ("open_store", "verify", "push", "only", "choose_tokens", "in_nats", "simulate_heads", "sites_of"),
    "Compare stores": ("model_differences",),
    "Experiments": ("Graph", "Variants", "sweep"),
    "Choose sites": ("site", "chosen_heads", "late_heads", "select_heads", "layer_numbers"),
    "Prompts": ("Prompts", "text_prompts", "ioi_prompts", "repeated_prompts", "edited_prompts", "does_task"),
    "Beside runs": ("attribution", "false_negatives", "write_words", "optimal_constants"),
    "Errors": ("SelfRepairError", "UsageError"),
}
"""Where on the page of names each is; sites, replacements and statistics are told by the room they are in."""
REST = dict.fromkeys(("replacements", "edges", "constants"), "Replacements")
REST |= {"components": "Sites", "analysis": "Statistics"}


def on_config(config):
    """Formulas in fences are rendered here: no script, and nothing from elsewhere."""
    fence = {"name": "math", "class": "math", "format": lambda source, *_, **__: formula(source, "block")}
    config["mdx_configs"]["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def formula(source: str, display: str = "inline") -> str:
    """LaTeX as MathML. A prime is a letter of its own: browsers make one in an exponent too small to see."""
    return convert(source.strip().replace("'", r"\text{′}"), display=display)


def on_page_markdown(markdown, page, config, files):
    """Formulas within a line; links to what is no page of the site: to another page, or the path in words."""
    if page.file.src_uri in FORMULAS:
        markdown = INLINE.sub(lambda found: f"<span>{formula(found[1])}</span>", markdown)
    return OUTSIDE.sub(_inside, markdown)


def _inside(link: re.Match) -> str:
    words, path, anchor = link.groups("")
    if path.startswith("docs/"):
        return f"[{words}]({path.removeprefix('docs/')}{anchor})"
    return f"[{words}]({PAGES[path]}{anchor})" if path in PAGES else f"{words} (`{path}`)"


def on_files(files, config):
    """The reference, made from the stub that lists the public names; and the demo's explorer."""
    files.append(File.generated(config, "api.md", content=reference()))
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, EXPLORER, content=explorer(ROOT / config["extra"]["demo"])))
    return files


def explorer(store: Path) -> str:
    """The page of the demo's store, which is made where it is not there."""
    import selfrepair_nn as sr

    if not store.exists():
        sr.run("heads", model="tiny-neox", out=store)
    with TemporaryDirectory() as folder:
        return sr.view(store, Path(folder) / EXPLORER).read_text(encoding="utf-8")


def public() -> dict[str, str]:
    """The public names, and where each is: its module, and what it is called there."""
    body = ast.parse((ROOT / "selfrepair_nn" / "__init__.pyi").read_text()).body
    imported = [line for line in body if isinstance(line, ast.ImportFrom) and line.module != "selfrepair_nn"]
    return {
        each.asname or each.name: f"{line.module}.{each.name}" for line in imported for each in line.names
    }


def topics() -> dict[str, list[str]]:
    """Every public name once, below its heading. PluginError for one that has none."""
    found = {topic: list(names) for topic, names in TOPICS.items()}
    placed = {name for names in found.values() for name in names}
    for name, place in public().items():
        if name not in placed:
            room = place.split(".")[1]
            if room not in REST:
                raise PluginError(
                    f"{name} is public and has no place in the reference: give it one in docs/site.py"
                )
            found.setdefault(REST[room], []).append(name)
    return {topic: found[topic] for topic in dict.fromkeys((*TOPICS, *REST.values())) if topic in found}


def options() -> list[str]:
    """The table of a run's options: flag, default, meaning."""
    from selfrepair_nn.options import Options, flag

    rows = []
    for each in fields(Options):
        usual = "" if each.default in (None, ()) else f"`{each.default}`"
        rows.append(f"| `{flag(each.name)}` | {usual} | {each.metadata['help']} |")
    return ["| | default | |", "|---|---|---|", *rows]


def reference() -> str:
    """The page of every public name, in Markdown, with its signature and its documentation."""
    places = public()
    lines = ["# Python", "", "`import selfrepair_nn as sr`; every name below is `sr.NAME`.", ""]
    for topic, names in topics().items():
        lines += [f"## {topic}", ""]
        if "Options" in names:
            lines += [
                "Options of a run, each an argument of `sr.run`, a flag and a field of `sr.Options`:",
                "",
                *options(),
                "",
            ]
        for name in names:
            lines += [
                f"::: {places[name]}",
                "    options:",
                f"      heading: sr.{name}",
                f"      toc_label: {name}",
                "",
            ]
    return "\n".join(lines)
