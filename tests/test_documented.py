"""Every command and every block of Python in README and docs runs, on less: a tiny model, few tokens, no network.

What stands for something (M, P, a hub's name, a server) is replaced by something that is here. A command that needs a
server or a cluster is run as its plan. So are the gallery's runs, and those of a recipe whose store the page does not
use: all recipes run in tests/test_every_store.py. What the gallery then does is read as the command line reads it.
"""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from terminal import selfrepair

import selfrepair_nn as sr
from selfrepair_nn.cli import cli
from selfrepair_nn.figures import require_figures
from selfrepair_nn.models.load import find
from selfrepair_nn.recipe import recipe_paths

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODEL = "tiny-neox"
MODELS = (MODEL, "tiny-llama", "SmolLM2-135M-Instruct", "M", "DIR")
"""Names of models in the documents, beside those of a hub; here each is a directory with one tiny model."""
ELSEWHERE = ("--remote", "--host", "--dask", "--in-flight", "--patience", "--tensor-parallel", "--job-seconds")
LEFT_OUT = (
    "--workers",
    "--shard",
    "--device",
    "--tokens",
    "--length",
    "--layers",
    "--heads",
    "--until-ci",
    "--ci-of",
)
"""Choices of size and place: here a run is as small as it can be, in this process."""
FIRST_WORD = re.compile(
    r"^(?:    )?(?:srun )?(selfrepair (?:[a-z][a-z-]*) .*?|selfrepair recipes)$", re.MULTILINE
)


def commands(page):
    """The commands of a page, comments and continued lines apart."""
    text = page.read_text().replace("\\\n", " ")
    return [shlex.split(found.split("  #")[0].split(" | ")[0]) for found in FIRST_WORD.findall(text)]


def blocks(page):
    """The Python of a page: fenced, or indented and beginning with an import."""
    text = page.read_text()
    fenced = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
    plain = [re.sub(r"^    ", "", each, flags=re.MULTILINE).strip("\n") for each in indented]
    return fenced + [each for each in plain if re.match(r"(import|from) |\"\"\"", each)]


NOT_RUN = {
    "from dask.distributed import Client": "needs a cluster; tests/test_executors.py has one of its own",
    "from transformers import AutoModelForCausalLM": "tests/test_multimodal.py does it to six models",
    "from tests.ndif_server import Ndif": "tests/test_ndif_server.py does it",
    'import xarray as xr\n\ndataset = xr.open_zarr("hf://': "needs the hub; tests/test_hub.py has one",
    "import selfrepair_nn as sr\n\nheads = [sr.Head(28": "a large model; tests/test_optimal.py has a small one",
}
"""Python that is only compiled here, by how it begins."""


def smaller(command):
    """The command on less, with what is here in the place of what is not."""
    words, kept = iter(command), []
    served = any(option in command for option in ELSEWHERE)
    for word in words:
        if word in LEFT_OUT or word in ELSEWHERE[1:]:
            next(words)
        elif word not in ("--remote", "--serve", "--calibrate", "--try"):
            kept.append(_here(word))
    if kept[1] == "run" and served:
        kept[1] = "plan"
    if kept[1] in ("run", "plan") and {"ioi", "induction"} & {*kept}:
        kept += ["--param", "count=4"]
    if kept[1] == "run":
        kept.append("--skip-check")
    return kept[1:]


def _here(word):
    if re.fullmatch(r"(meta-llama|EleutherAI|local)/[\w.-]+", word):
        return MODEL
    if word in ("P", "NeelNanda/pile-10k"):
        return "text.txt"
    return f"outputs/shared/{Path(word).name}" if word.startswith(("/shared", "$SCRATCH")) else word


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with all that the documents speak of, small."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("documents")
    sizes = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).save_pretrained(folder / MODEL)
    experts = {"num_local_experts": 4, "num_key_value_heads": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, **experts)).save_pretrained(folder / "tiny-mixture")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for model in (MODEL, "tiny-mixture"):
            shutil.copy(Path(find("tiny-neox").location) / name, folder / model / name)
    for name in MODELS[1:]:
        (folder / name).symlink_to(folder / MODEL)
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(1, 2048, (24, 16)))
    np.save(folder / "partners.npy", np.roll(np.arange(24), 1))
    (folder / "text.txt").write_text(
        "\f\n".join(f"The {word} of the sea was cold. " * 12 + "\n" for word in WORDS)
    )
    (folder / "train-neox").mkdir()
    for step in (0, 16, 32, 64, 128, 256, 512):
        (folder / "train-neox" / f"step{step}").symlink_to(folder / MODEL)
    heads = [sr.Head(layer, head) for layer in range(3) for head in range(2)]
    sr.Constants({head: np.full(8, 0.1) for head in heads}).save(folder / "constants.npz")
    (folder / "path" / "to").mkdir(parents=True)
    shutil.copy(ROOT / "recipes" / "heads.py", folder / "path" / "to" / "mine.py")
    lines = (ROOT / "docs" / "recipes.md").read_text().split("as a map:\n\n")[1].split("\nRun it")[0]
    (folder / "pairs.py").write_text(re.sub(r"^    ", "", lines, flags=re.MULTILINE))
    return folder


WORDS = [
    f"{one}{two}" for one in ("wave", "ship", "sand", "wind", "salt") for two in ("", "s", "y", "ing", "er")
]


def readable(command):
    """Whether there is such a command with such options, and such figures."""
    with cli.commands[command[0]].make_context(command[0], list(command[1:])) as context:
        require_figures(context.params.get("names") or ())


def unread(command, page):
    """Whether a page only runs a recipe that comes with the package, and goes on with something else."""
    stores = [word for word in command if word.startswith("outputs/")]
    return command[1] in {*recipe_paths()} - {"heads"} and all(page.read_text().count(each) == 1 for each in stores)


@pytest.fixture(scope="module")
def done():
    """What was run already: what several pages say is run once, and what came of it is there for all of them."""
    return set()


@pytest.fixture
def small(place, monkeypatch, hardly_written):
    """Within the directory that has all this; 24 short prompts as sample, figures drawn and hardly written."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("selfrepair_nn.prompts.SAMPLE_TOKENS", 24 * 16)
    monkeypatch.setattr("selfrepair_nn.prompts.DEFAULT_LENGTH", 16)
    monkeypatch.setattr("selfrepair_nn.models.load.EMBEDDED", {})


def test_commands_are_found():
    assert sum(len(commands(page)) for page in PAGES) > 100
    assert sum(len(blocks(page)) for page in PAGES) > 8
    every = [block for page in PAGES for block in blocks(page)]
    assert all(any(block.startswith(start) for block in every) for start in NOT_RUN)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page) or blocks(page)], ids=lambda page: page.stem
)
def test_commands_and_python_run(page, small, done, capsys):
    names, gallery = {}, "gallery" in str(page)
    for command in [["selfrepair", "run", "heads"], *commands(page)]:
        less = tuple(smaller(command))
        if less[0] == "run" and (gallery or unread(less, page)):
            less = ("plan", *(word for word in less[1:] if word != "--skip-check"))
            less = tuple(word.replace("outputs/", "planned/") for word in less)  # where no other page has a store
        if less not in done:
            if (gallery and less[0] != "plan") or less[0] == "push" or "hf://" in " ".join(less):
                readable(less)
            else:
                ended = selfrepair(*less)
                assert ended.code == 0, (shlex.join(command), shlex.join(less), ended.err)
        done.add(less)
    for block in blocks(page):
        code = compile(block.replace("layer=6, head=3", "layer=1, head=1"), page, "exec")
        if not any(block.startswith(start) for start in NOT_RUN):
            exec(code, names)
