"""Nothing that comes with a store, a model or a dataset is ever executed, whoever answers the question."""

import builtins
import json

import pytest
from terminal import ids, saved, selfrepair

import selfrepair_nn as sr
from selfrepair_nn.corpora import _no_code
from selfrepair_nn.errors import SelfRepairError
from selfrepair_nn.models.load import describe, load_tokenizer, structure_only

CODE = """
open({marker!r}, "w").close()
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
class Config(GPT2Config):
    model_type = "{model_type}"
class Model(GPT2LMHeadModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
MAPS = {
    "AutoConfig": "evil.Config",
    "AutoModel": "evil.Model",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """planted(model_type, **changes): a directory of a model with code of its own; everybody says yes to it."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("it asks whether to run the code"))

    def make(model_type="gpt2", **changes):
        directory = saved(tmp_path / "m")
        (directory / "evil.py").write_text(
            CODE.format(marker=str(tmp_path / "marker"), model_type=model_type)
        )
        config = json.loads((directory / "config.json").read_text())
        config |= {"model_type": model_type, "auto_map": MAPS} | changes
        (directory / "config.json").write_text(json.dumps(config))
        tokenizer = {"auto_map": {"AutoTokenizer": MAPS["AutoTokenizer"]}, "tokenizer_class": "Tokenizer"}
        (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        return directory

    yield make
    assert not (tmp_path / "marker").exists()


def test_a_family_that_transformers_has_is_loaded_without_the_models_code(planted, tmp_path):
    model, prompts = planted(), ids(tmp_path / "p.npy")
    ended = selfrepair("run", "heads", "--model", model, "--prompts", prompts, "--out", tmp_path / "s.zarr")
    assert (ended.code, ended.err) == (0, "")
    assert selfrepair("check", model).code == 0
    assert sr.load(str(model)).name == str(model)


def test_a_family_of_the_models_own_is_refused(planted, tmp_path):
    model, prompts = planted("evil"), ids(tmp_path / "p.npy")
    for command in (
        ["run", "heads", "--prompts", prompts, "--out", tmp_path / "s.zarr", "--model"],
        ["check"],
    ):
        ended = selfrepair(*command, model)
        assert ended.code == 1
        assert "nothing that comes with a model is ever run" in ended.err
        assert "trust_remote_code" not in ended.err


def test_a_served_models_structure_is_built_without_its_code(planted):
    description = describe(str(planted()))
    tokenizer = load_tokenizer(description.source)
    assert structure_only(description, tokenizer).structure.n_layers == 3


@pytest.mark.parametrize(
    "changes", [{"attn_implementation": "someone/kernel"}, {"attn_implementation": "a/b@main:c"}]
)
def test_attention_code_of_the_hub_is_refused(planted, changes):
    with pytest.raises(SelfRepairError, match=r"code of the hub .*attn_implementation.*ever run"):
        describe(str(planted(**changes)))


def test_a_datasets_script_is_not_run(tmp_path):
    (tmp_path / "data").mkdir()
    marker = tmp_path / "marker"
    (tmp_path / "data" / "data.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (tmp_path / "data" / "a.txt").write_text("Some words of a text. " * 200)
    selfrepair("plan", "heads", "--prompts", tmp_path / "data", "--tokens", "256")
    assert not marker.exists()


def test_older_datasets_are_told_not_to_run_scripts():
    def older(path, split=None, trust_remote_code=None):
        """As `datasets.load_dataset` before version 4."""

    assert _no_code(older) == {"trust_remote_code": False}
    assert _no_code(lambda path, **kwargs: None) == {}
