"""A tokenizer that is there, that is not, and that is damaged."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from terminal import selfrepair

from selfrepair_nn.errors import SelfRepairError
from selfrepair_nn.models.load import Source, find, load_tokenizer


def with_tokenizer(place, change):
    """A directory with the tokenizer of tiny-neox, changed."""
    whole = Path(find("tiny-neox").location)
    shutil.copytree(whole, place / "m")
    change(place / "m")
    return place / "m"


def rewritten(**parts):
    def change(folder):
        found = json.loads((folder / "tokenizer.json").read_text()) | parts
        (folder / "tokenizer.json").write_text(json.dumps(found))

    return change


DAMAGES = {
    "empty": (lambda m: (m / "tokenizer.json").write_text(""), r"tokenizer\.json \(JSONDecodeError"),
    "cut": (lambda m: os.truncate(m / "tokenizer.json", 100), r"tokenizer\.json \(JSONDecodeError"),
    "binary": (
        lambda m: (m / "tokenizer.json").write_bytes(b"\xff\0" * 99),
        r"tokenizer\.json \(UnicodeDecodeError",
    ),
    "object": (
        lambda m: (m / "tokenizer.json").write_text("{}"),
        r"tokenizer\.json, tokenizer_config\.json.*KeyError",
    ),
    "list": (lambda m: (m / "tokenizer.json").write_text("[]"), r"tokenizer\.json holds no JSON object"),
    "model": (
        rewritten(model={"type": "Nope"}),
        r"tokenizer\.json, tokenizer_config\.json \(Exception: data did not",
    ),
    "no words": (
        rewritten(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]),
        "it has no token",
    ),
    "settings": (
        lambda m: (m / "tokenizer_config.json").write_text('{"a'),
        r"tokenizer_config\.json \(JSONDecodeError",
    ),
    "settings of another kind": (
        lambda m: (m / "tokenizer_config.json").write_text("[]"),
        r"tokenizer_config\.json holds no JSON object",
    ),
    "only settings": (lambda m: (m / "tokenizer.json").unlink(), r"tokenizer_config\.json \(ValueError"),
    "a link to nothing": (
        lambda m: ((m / "tokenizer.json").unlink(), (m / "tokenizer.json").symlink_to("gone")),
        r"tokenizer\.json \(FileNotFoundError",
    ),
    "a directory": (
        lambda m: ((m / "tokenizer.json").unlink(), (m / "tokenizer.json").mkdir()),
        r"tokenizer\.json \(IsADirectoryError",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tokenizer_is_told_as_such(tmp_path, damage):
    change, said = DAMAGES[damage]
    model = with_tokenizer(tmp_path, change)
    ended = selfrepair("plan", "heads", "--model", model, "--tokens", 256)
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert re.search(rf"the tokenizer of '.*m' is damaged: {said}", ended.err), ended.err
    assert "remove them and give .npy token ids" in ended.err


def test_a_model_without_a_tokenizer_has_none(tmp_path):
    """Its family's tokenizer without any word would make prompts of nothing."""
    model = with_tokenizer(tmp_path, lambda m: [each.unlink() for each in m.glob("tokenizer*")])
    assert load_tokenizer(find(str(model))) is None
    ended = selfrepair("plan", "heads", "--model", model, "--tokens", 256)
    assert (ended.code, "give a tokenizer with it, or a .npy file of token ids" in ended.err) == (2, True)
    np.save(tmp_path / "p.npy", np.zeros((4, 8), int))
    assert selfrepair("plan", "heads", "--model", model, "--prompts", tmp_path / "p.npy").code == 0


def test_the_package_that_a_tokenizer_needs(tmp_path, monkeypatch):
    def missing(*_a, **_k):
        raise ImportError("This tokenizer needs sentencepiece")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", missing)
    with pytest.raises(SelfRepairError, match="needs a package that is missing: ImportError: This"):
        load_tokenizer(find(str(with_tokenizer(tmp_path, lambda m: None))))
    assert load_tokenizer(Source("owner/name", "owner/name")) is None
