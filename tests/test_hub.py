"""A store on the Hugging Face Hub: published, with a card; read back from its address; and what may go wrong with both.

The hub is a stand-in on loopback (dataset_hub): its own client talks to it as to the real one, but for xet.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml
from damaged import flipped
from dataset_hub import TOKEN, hub
from terminal import selfrepair

import selfrepair_nn as sr
from selfrepair_nn import publishing
from selfrepair_nn.card import fenced, words
from selfrepair_nn.errors import SelfRepairError, StoreError, UsageError
from selfrepair_nn.hub import Address, at_hand
from selfrepair_nn.store import Store

SMALL = {
    "tokens": 320,
    "length": 32,
    "layers": "6:",
    "heads": "6.1,6.3,7.1,7.3,7.5",
    "check": False,
    "progress": False,
}
NAME, PLACE = "owner/results", "hf://datasets/owner/results/heads.zarr"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Path(
        sr.run("heads", out=tmp_path_factory.mktemp("hub") / "heads.zarr", **SMALL).encoding["source"]
    )


@pytest.fixture(scope="module")
def running():
    """The stand-in, and the hub's client set to it, as a process that starts with these variables has it."""
    import huggingface_hub
    from huggingface_hub import constants

    with hub() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in vars(constants).items():
            if isinstance(value, str) and value.startswith("https://huggingface.co"):
                patch.setattr(constants, name, value.replace("https://huggingface.co", server.url))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        patch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def there(running, tmp_path, monkeypatch):
    """The stand-in with nothing in it, a cache of its own, and the owner's token."""
    from huggingface_hub import constants

    running.repos.clear()
    running.asked.clear()
    running.refuse = lambda method, path: None
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    return running


@pytest.fixture(scope="module")
def published(running, made, tmp_path_factory):
    """The files of the repository that the store was published as, which tests put there again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        running.repos.clear()
        assert sr.push(made, NAME) == PLACE
        return dict(running.repos[NAME]["files"])


@pytest.fixture
def shared(there, published):
    there.repos[NAME] = {"private": False, "files": dict(published)}
    return there


# ---------------------------------------------------------------- there and back


def test_what_is_published_is_the_store_byte_for_byte_and_a_card(made, published):
    own = {
        f"heads.zarr/{p.relative_to(made).as_posix()}": p.read_bytes() for p in made.rglob("*") if p.is_file()
    }
    assert {k: v for k, v in published.items() if k != "README.md"} == own


def test_a_store_is_read_from_its_address(made, shared):
    """All its bytes, and without asking who reads; twice, and it is fetched once."""
    del shared.asked[:]
    found, known = sr.open_store(PLACE), sr.open_store(made)
    xr.testing.assert_identical(found.load(), known.load())
    assert found.encoding["source"] == PLACE
    assert not sr.verify(PLACE)
    fetched = [path for method, path in shared.asked if method == "GET" and "/resolve/" in path]
    assert len(fetched) == len({*fetched}) == len(shared.repos[NAME]["files"]) - 1
    xr.testing.assert_identical(sr.by_head(PLACE), sr.by_head(made).assign_attrs(sr.by_head(PLACE).attrs))


def test_bare_xarray_reads_it_from_its_address(made, shared):
    """By the card's lines, and only what they ask for."""
    lines = re.search(r"```python\n(.*?)```", shared.repos[NAME]["files"]["README.md"].decode(), re.DOTALL)[1]
    del shared.asked[:]
    names: dict = {}
    exec(lines.replace("dataset.self_repair", "repair = dataset.self_repair"), names)
    np.testing.assert_allclose(names["repair"], sr.by_head(made).top_self_repair, rtol=0, atol=1e-6)
    assert not [path for _, path in shared.asked if "/logit_change/c/" in path]


@pytest.mark.parametrize("command", ["info", "verify", "view"])
def test_commands_take_its_address_and_write_here(shared, tmp_path, command):
    ended = selfrepair(command, PLACE)
    assert ended.code == 0, ended.err
    assert f"reads {PLACE}" in ended.err
    assert {path.name for path in tmp_path.iterdir()} <= {
        "cache",
        "heads",
        "heads.html",
        "heads-explorer.html",
    }


def test_the_command_publishes_and_says_where(there, made):
    ended = selfrepair(
        "push", made, NAME, "--private", "--path-in-repo", "runs/a.zarr", "--license", "cc-by-4.0"
    )
    assert (ended.code, ended.out) == (0, "hf://datasets/owner/results/runs/a.zarr\n")
    assert there.repos[NAME]["private"]
    assert "runs/a.zarr/zarr.json" in there.repos[NAME]["files"]
    assert TOKEN not in ended.err


def test_what_is_interrupted_is_no_store_and_goes_on(there, made, monkeypatch):
    """The file that makes a directory a store comes last; what is there is not sent again."""
    monkeypatch.setattr(publishing, "TOGETHER", 30)
    done = []

    def refuse(method, path):
        done.extend([path] if "/commit/" in path else [])
        return 500 if len(done) == 3 else None

    there.refuse = refuse
    with pytest.raises(SelfRepairError, match="cannot publish"):
        sr.push(made, NAME)
    kept = dict(there.repos[NAME]["files"])
    assert len(kept) == 60
    assert "heads.zarr/zarr.json" not in kept
    there.refuse = lambda method, path: None
    with pytest.raises(StoreError, match="not a store"):
        sr.open_store(PLACE)
    del there.asked[:]
    assert sr.push(made, NAME) == PLACE
    sent = {path for method, path in there.asked if method == "PUT"}
    assert not sr.verify(PLACE)
    assert len(sent) < len(there.repos[NAME]["files"]) - 60


# ---------------------------------------------------------------- the card


def test_the_card_says_what_was_run_on_what_and_how_well_it_is_known(made, published):
    text, told = published["README.md"].decode(), sr.open_store(made).attrs
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["pretty_name"] == "heads of tiny-neox"
    assert "self-repair" in front["tags"]
    assert told["command"] in text
    provenance = json.loads(told["provenance"])
    assert provenance["prompts"]["sha256"] in text
    assert told["fingerprint"] in text
    assert "noise floor" in text
    assert "closure" in text
    assert "Rushing" in text
    assert f"selfrepair view {PLACE}" in text


HOSTILE = (
    "---\nlicense: evil\n---\n# <script>x</script> ![a](http://e.vil/x) ``` | [b](javascript:1) \x1b[31m"
)


def test_what_others_wrote_is_text_in_a_card(there, made, tmp_path):
    """In the front matter, the table, and the blocks of code."""
    copied = tmp_path / "heads.zarr"
    shutil.copytree(made, copied)
    Store(copied).annotate(**dict.fromkeys(("title", "model", "command", "fingerprint", "references"), HOSTILE))
    sr.push(copied, NAME)
    text = there.repos[NAME]["files"]["README.md"].decode()
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert set(yaml.safe_load(front)) == {"pretty_name", "tags", "viewer"}
    assert yaml.safe_load(front)["pretty_name"].startswith("---\\nlicense")
    prose = re.sub(r"^(`{3,}).*?^\1$", "", body, flags=re.MULTILINE | re.DOTALL)
    assert not [x for x in ("<script", "](http://e", "://e.vil", "](java") if x in prose]
    assert "\x1b" not in text
    assert "````sh\n" in body


@pytest.mark.parametrize(
    "text", ["<b>", "[a](b)", "![a](b)", "a|b", "`a`", "# a", "http://x.y", "a@b.c", "*a*", "&lt;"]
)
def test_words_do_nothing_in_markdown(text):
    import html

    assert not set(re.sub("&#\\d+;", "", words(text))) & set("<>[]|`*@#&")
    assert "://" not in words(text)
    assert html.unescape(words(text)) == text


def test_nothing_ends_a_block_of_code():
    told = fenced("a\n```\n````\nb", "sh").split("\n")
    assert told[0] == "`````sh"
    assert told[-1] == "`````"
    assert "`````" not in told[1:-1]


def test_a_repository_with_a_card_of_its_own_keeps_it(there, made):
    there.repos[NAME] = {"private": False, "files": {"README.md": b"# Mine"}}
    sr.push(made, NAME)
    assert there.repos[NAME]["files"]["README.md"] == b"# Mine"
    assert b"Open it" in there.repos[NAME]["files"]["heads.md"]


# ---------------------------------------------------------------- what may go wrong


@pytest.mark.parametrize(
    "name", ["results", "a/b/c", "owner/", "owner/re sults", "owner/..", "hf://datasets/a/b"]
)
def test_what_is_no_name_is_refused_before_anything_is_read(there, made, name, monkeypatch):
    monkeypatch.setattr(publishing, "verify", lambda path: pytest.fail("read the store first"))
    with pytest.raises(UsageError, match="write owner/name"):
        sr.push(made, name)
    assert not there.asked


@pytest.mark.parametrize("where", ["../x.zarr", "/x.zarr", "", "a//b", "README.md", "a\nb"])
def test_what_is_no_path_in_a_repository(there, made, where):
    with pytest.raises(UsageError, match="path_in_repo"):
        sr.push(made, NAME, path_in_repo=where)


@pytest.mark.parametrize("where", ["a b/ü#%20@v.zarr", "[x]*?"])
def test_odd_paths_lead_there_and_back(there, made, where):
    assert at_hand(sr.push(made, NAME, path_in_repo=where)).name == where.rpartition("/")[2]
    assert f"{where}/zarr.json" in there.repos[NAME]["files"]
    xr.testing.assert_identical(sr.open_store(f"hf://datasets/{NAME}/{where}").load(), sr.open_store(made).load())


def test_offline_nothing_is_published_and_that_is_said_at_once(there, made, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(publishing, "verify", lambda path: pytest.fail("read the store first"))
    with pytest.raises(SelfRepairError, match="HF_HUB_OFFLINE is set: unset it"):
        sr.push(made, NAME)
    assert not there.asked


def test_without_a_token(there, made, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(publishing, "hub_token", lambda: None)
    ended = selfrepair("push", made, NAME)
    assert ended.code == 1
    assert "there is no token for the Hugging Face Hub: set HF_TOKEN, or run `hf auth login`" in ended.err
    assert not there.asked


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("other/results", TOKEN, "(403): the token may not do that"),
        (NAME, "hf_of-somebody-else", "(401): it does not know who asks"),
    ],
)
def test_where_the_token_may_not_write(there, made, monkeypatch, name, token, said):
    monkeypatch.setenv("HF_TOKEN", token)
    ended = selfrepair("push", made, name)
    assert ended.code == 1
    assert said in ended.err
    assert token not in ended.err
    assert "Traceback" not in ended.err


def test_a_store_that_is_not_whole_or_not_finished(there, made, tmp_path):
    part = sr.run("heads", out=tmp_path / "part.zarr", **SMALL, shard="1/2", batch_size=2).encoding["source"]
    with pytest.raises(StoreError, match="has not finished"):
        sr.push(part, NAME)
    shutil.copytree(made, tmp_path / "harmed.zarr")
    flipped(tmp_path / "harmed.zarr/self_repair/c/0/0/0/0")
    with pytest.raises(StoreError, match="is not whole: self_repair"):
        sr.push(tmp_path / "harmed.zarr", NAME)
    assert not there.asked
    for name, said in (
        ("part", "its run has not finished"),
        ("harmed", "1 of its files are missing or damaged"),
    ):
        sr.push(tmp_path / f"{name}.zarr", f"owner/{name}", as_it_is=True)
        assert f"**{said}.**" in there.repos[f"owner/{name}"]["files"]["README.md"].decode()


def test_another_store_is_not_written_over(shared, tmp_path):
    other = sr.run("heads", out=tmp_path / "heads.zarr", **SMALL | {"tokens": 160}).encoding["source"]
    with pytest.raises(StoreError, match="holds another store: choose another --path-in-repo"):
        sr.push(other, NAME)


def test_what_is_public_is_not_taken_for_private(shared, made):
    with pytest.raises(StoreError, match="is there, and public"):
        sr.push(made, NAME, private=True)
    assert not [path for _, path in shared.asked if "/commit/" in path]


@pytest.mark.parametrize(
    ("store", "kind", "said"),
    [
        (
            "hf://datasets/owner/results",
            UsageError,
            "is an address of no store: one is written hf://datasets/owner/name",
        ),
        ("hf://spaces/owner/results/x.zarr", UsageError, "is an address of no store"),
        ("hf://datasets/owner/results/../x.zarr", UsageError, "is an address of no store"),
        (
            "hf://datasets/owner/other/x.zarr",
            SelfRepairError,
            r"the hub refuses \(404\): there is no such repository",
        ),
        ("hf://datasets/owner/results/other.zarr", StoreError, "its repository has no such path"),
        ("hf://datasets/owner/results/README.md", StoreError, "no such path"),
    ],
)
def test_an_address_that_leads_nowhere(shared, store, kind, said):
    with pytest.raises(kind, match=said):
        sr.open_store(store)


def test_a_hub_that_does_not_answer(there, made, monkeypatch):
    from huggingface_hub import constants

    for name, value in vars(constants).items():
        if isinstance(value, str) and value.startswith(there.url):
            monkeypatch.setattr(constants, name, value.replace(there.url, "http://127.0.0.1:9"))
    with pytest.raises(SelfRepairError, match="the hub does not answer"):
        sr.open_store(PLACE)


def test_addresses_are_read_as_they_are_written():
    assert Address.of("hf://datasets/a/b/c/d.zarr") == Address("a/b", "c/d.zarr")
    assert Address.of("hf://datasets/a/b@refs%2Fpr%2F1/d.zarr/") == Address("a/b", "d.zarr", "refs/pr/1")
    assert str(Address("a/b", "d.zarr", "refs/pr/1")) == "hf://datasets/a/b@refs%2Fpr%2F1/d.zarr"
    assert at_hand("x.zarr") == Path("x.zarr")


def test_a_published_store_that_lacks_a_file_is_told(shared):
    del shared.repos[NAME]["files"]["heads.zarr/self_repair/c/0/0/0/0"]
    with pytest.raises(StoreError, match="self_repair/c/0/0/0/0 is missing"):
        sr.open_store(PLACE)
