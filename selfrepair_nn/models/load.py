"""Finding and loading a causal language model: embedded, a directory, a GGUF file or a hub name."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from selfrepair_nn.errors import SelfRepairError, UsageError, one_line
from selfrepair_nn.models.architectures import architecture_of, structure_of, text_config
from selfrepair_nn.models.check import Finding, findings, require
from selfrepair_nn.models.kinds import beside_text, kind_of, reading, unheard_of
from selfrepair_nn.models.model import (
    AS_SERVED,
    Description,
    Model,
    Source,
    choose_experts,
    wrap,
)
from selfrepair_nn.models.tokenizer import SAFE, load_tokenizer
from selfrepair_nn.paths import require_possible
from selfrepair_nn.settings import require_hub

EMBEDDED = {
    "tiny-neox": "2M parameters, 8 layers x 8 heads, parallel attention and MLP, LayerNorm (Pythia's architecture)",
    "tiny-llama": "2M parameters, 8 layers x 8 heads, grouped queries, RMSNorm (Llama's architecture)",
}
RECOMPUTED = re.compile(r"\.(masked_bias|inv_freq|rotary_emb\.(cos|sin)_cached)$")
"""Buffers that older checkpoints hold and that every model makes anew: attention masks, rotary frequencies."""
UNKNOWN = re.compile(r"model type `(.+?)` but Transformers does not recognize")
BALANCED = "balanced"
"""As a device: a model that is too large for one is spread over all GPUs, layer by layer, by accelerate."""
NO_CODE = "nothing that comes with a model is ever run"
DTYPES = ("float32", "float64", "bfloat16", "float16")


def find(name: str, revision: str | None = None) -> Source:
    """Resolve a model's name: embedded, an existing directory or GGUF file, otherwise a hub name.

    Raises:
        UsageError: a path that does not exist, a directory without a configuration, or a revision of what has none.
        SelfRepairError: a hub name, and settings with which the hub cannot be asked.
    """
    if found := here(name):
        if revision is not None:
            raise UsageError(
                f"revision {revision!r} is for models of the hub, and {name!r} is here: leave --revision out"
            )
        return found
    require_hub()
    return Source(name, name, revision=revision)


def here(name: str) -> Source | None:
    """A model that needs no hub; None where only that can know the name."""
    require_possible(name, "model")
    if name in EMBEDDED:
        return Source(name, str(files("selfrepair_nn") / "models" / "embedded" / name))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"model file {name!r} does not exist")
        return Source(name, str(path.parent), gguf_file=path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(
                f"directory {name!r} holds no config.json: give a directory written by save_pretrained"
            )
        return Source(name, str(path))
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UsageError(f"model directory {name!r} does not exist")
    return None


def describe(name: str, revision: str | None = None) -> Description:
    """Configuration and structure of a model, without its weights.

    Raises:
        UnsupportedModel: a family or a configuration that cannot be decomposed exactly.
        UsageError: no model of that name.
    """
    import torch
    from transformers import AutoConfig

    source = find(name, revision)
    with _explained(source):
        config = AutoConfig.from_pretrained(source.location, **SAFE, **source.arguments)
        architecture_of(config)
        _, auto = kind_of(config)
        if "/" in str(config._attn_implementation):
            raise SelfRepairError(
                f"the configuration of {source.name!r} asks for code of the hub (attn_implementation "
                f"{config._attn_implementation!r}), and {NO_CODE}: take that entry out"
            )
        with torch.device("meta"):
            structure = structure_of(auto.from_config(config, **SAFE))
    return Description(source, config, structure, getattr(config, "_commit_hash", None))


def load(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    revision: str | None = None,
    check: bool = True,
) -> Model:
    """Load a model and prove on a short random input that it is decomposed exactly.

    Args:
        name: "tiny-neox", "tiny-llama", a directory, a GGUF file, or a hub name such as "EleutherAI/pythia-160m".
        dtype: what the model computes in: float32, float64, bfloat16 or float16.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" …; "balanced" spreads it over all GPUs.
        revision: branch, tag or commit of a hub model.
        check: False skips the proof, at your own risk.

    Raises:
        UsageError: no such model, dtype or device.
        UnsupportedModel: the family is unknown, or the check fails.
    """
    description = describe(name, revision)
    return load_described(description, load_tokenizer(description.source), dtype, device, check)


def load_described(description: Description, tokenizer: Any, dtype: str, device: str, check: bool) -> Model:
    """Load the weights of a model that is described already; see `load`."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    model = wrap(_module(description, dtype, _device(device, dtype)).eval(), tokenizer, description)
    choose_experts(model)
    if check:
        require(model)
    return model


def structure_only(description: Description, tokenizer: Any) -> Model:
    """A model as a client of a server needs it: its modules on the meta device, no weights read.

    Raises:
        UsageError: a GGUF file, which servers do not serve.
    """
    from nnsight import TransformersModel
    from nnsight.modeling import huggingface

    source = description.source
    task, _ = kind_of(description.config)
    if source.gguf_file:
        raise UsageError(f"a server cannot serve {source.name!r}: name the model as the server knows it")
    if Path(source.location).is_dir():
        # nnsight asks the hub for the proper spelling of every name; a directory is its own name.
        huggingface._ID_CACHE[source.location] = source.location
    with _explained(source):
        nn = TransformersModel(
            source.location,
            revision=source.revision,
            **reading(task, tokenizer),
            **SAFE,
        )
    return Model(description, nn, tokenizer, AS_SERVED, "server")


def check(model, tokens=None) -> list[Finding]:
    """Measure what must hold for a model to be decomposed exactly, in the state it is in.

    On a few short random prompts:

    - the direct effects of all components and the constant add up to the logits that the model returns
    - an ablation that starts at its own layer changes these as a whole pass does, for a head of each layer
    - the parts of the self-repair add up
    - a later token changes nothing before it

    and on `tokens` [prompt, position], a run's own, at their full length (the random ones again, if None):

    - a pass gives the logits that the model returns
    - replacing a head by itself changes nothing

    `model` is a loaded one, a module, or a name or directory, which is loaded for it.

    Raises:
        UsageError: no model of that name, or nothing that is one.
    """
    given = accepted(model)
    return findings(load(given, check=False) if isinstance(given, str) else given, tokens)


def accepted(model: Any) -> Any:
    """What `run` takes as a model: a name or a path as a string; a module, wrapped with its own tokenizer; a Model.

    Raises:
        UsageError: something else.
    """
    if isinstance(model, str | Model):
        return model
    if isinstance(model, os.PathLike):
        path = Path(model).expanduser()
        if not path.exists():
            raise UsageError(f"model directory {str(path)!r} does not exist")
        return str(path)
    config = getattr(model, "config", None)
    source = Source(*[getattr(config, "name_or_path", None) or ""] * 2)
    return wrap(model, load_tokenizer(source) if source.location else None)


def _module(description: Description, dtype: str, device: str) -> Any:
    import torch

    source, more = description.source, {"device_map": BALANCED} if device == BALANCED else {}
    _, auto = kind_of(description.config)
    with _explained(source):
        loaded: Any = auto.from_pretrained(
            source.location,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            **more,
            **SAFE,
            **source.arguments,
        )
    module, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise SelfRepairError(
            f"the files of model {source.name!r} lack {len(missing)} of its weights (for example {missing[0]}): "
            "they would be random; give the files that belong to its configuration"
        )
    if unused := _unused(description.config, found["unexpected_keys"]):
        raise SelfRepairError(
            f"the files of model {source.name!r} hold {len(unused)} weights that its configuration does not use (for "
            f"example {', '.join(unused[:3])}): without them it is not the model that was trained. Give the "
            "configuration that belongs to them; or load it with transformers and hand in the module, if they are "
            "really not to be used"
        )
    return module if device == BALANCED else module.to(device)


def _unused(config: Any, unexpected: Iterable[str]) -> list[str]:
    """Weights of the files that belong to nothing: not made anew, and no other part of a multimodal model."""
    left = sorted(key for key in unexpected if not RECOMPUTED.search(key))
    return left if text_config(config) is config or not left else sorted(set(left) - beside_text(config))


def _device(name: str, dtype: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == BALANCED:
        if not find_spec("accelerate"):
            raise UsageError(f"device {name!r} needs accelerate: pip install 'selfrepair_nn[balanced]'")
        return name
    if name.startswith("mps") and dtype == "float64":
        raise UsageError("a Mac's GPU has no float64: choose --dtype float32, or --device cpu")
    try:
        torch.ones(1, device=name).sum().item()
    except Exception as error:  # as many kinds as there are devices
        raise UsageError(f"device {name!r} cannot be used here ({one_line(error)}); try cpu") from error
    return name


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Turn the loaders' many exceptions into one line with a remedy."""
    try:
        yield
    except SelfRepairError:
        raise
    except ImportError as error:
        raise SelfRepairError(
            f"loading {source.name!r} needs a package that is missing: {one_line(error)}"
        ) from error
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise SelfRepairError(
                f"model {source.name!r} needs code that comes with it, and {NO_CODE}: give a model of a family that "
                "transformers has itself"
            ) from error
        if unknown := UNKNOWN.search(str(error)):
            raise unheard_of(source.name, unknown[1]) from error
        if source.gguf_file or Path(source.location).is_dir():
            raise SelfRepairError(f"model {source.name!r} could not be loaded: {one_line(error)}") from error
        raise UsageError(
            f"no model {source.name!r}: it is not embedded ({', '.join(EMBEDDED)}), not a directory here, "
            f"and the hub did not give it ({one_line(error)})"
        ) from error
