"""Finding and loading a causal language model: embedded, a directory, a GGUF file or a hub name."""

import hashlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from selfrepair_nn.errors import SelfRepairError, UsageError, one_line
from selfrepair_nn.models.architectures import Structure, architecture_of, structure_of
from selfrepair_nn.models.tokenizer import load_tokenizer
from selfrepair_nn.remote.settings import require_hub

EMBEDDED = {
    "tiny-neox": "2M parameters, 8 layers x 8 heads, parallel attention and MLP, LayerNorm (Pythia's architecture)",
    "tiny-llama": "2M parameters, 8 layers x 8 heads, grouped queries, RMSNorm (Llama's architecture)",
}
AS_SERVED = "as served"
UNKNOWN_WEIGHTS = "not known: they are on a server"
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Source:
    """Where a model comes from; `location` is what Hugging Face's loaders take."""

    name: str
    location: str
    gguf_file: str | None = None
    revision: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        given = {"gguf_file": self.gguf_file, "revision": self.revision}
        return {k: v for k, v in given.items() if v is not None}


@dataclass(frozen=True)
class Description:
    """A model as its configuration tells, no weight loaded. `revision` is the resolved commit of a hub model."""

    source: Source
    config: Any
    structure: Structure
    revision: str | None


@dataclass(frozen=True)
class Model:
    """A loaded model: `nn` is the nnsight model that jobs run on, `tokenizer` is None where there is none."""

    description: Description
    nn: Any
    tokenizer: Any
    dtype: str
    device: str
    fingerprint: str

    @property
    def name(self) -> str:
        return self.description.source.name

    @property
    def structure(self) -> Structure:
        return self.description.structure

    @property
    def layout(self) -> dict[str, Any]:
        """The structure as the plain dict that travels with a job."""
        return asdict(self.structure)


def find(name: str, revision: str | None = None) -> Source:
    """Resolve a model's name: embedded, an existing directory or GGUF file, otherwise a hub name.

    Raises:
        UsageError: a path that does not exist, a directory without a configuration, or a revision of what has none.
        SelfRepairError: a hub name, and settings with which the hub cannot be asked.
    """
    if found := _here(name):
        if revision is not None:
            raise UsageError(
                f"revision {revision!r} is for models of the hub, and {name!r} is here: leave --revision out"
            )
        return found
    require_hub()
    return Source(name, name, revision=revision)


def _here(name: str) -> Source | None:
    """A model that needs no hub; None where only that can know the name."""
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
    from transformers import AutoConfig, AutoModelForCausalLM

    source = find(name, revision)
    with _explained(source):
        config = AutoConfig.from_pretrained(source.location, **source.arguments)
        architecture_of(config)
        with torch.device("meta"):
            structure = structure_of(AutoModelForCausalLM.from_config(config))
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
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" …
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
    from selfrepair_nn.models.check import require

    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    model = wrap(_module(description, dtype, _device(device)), tokenizer, description)
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
    if source.gguf_file:
        raise UsageError(f"a server cannot serve {source.name!r}: name the model as the server knows it")
    if Path(source.location).is_dir():
        # nnsight asks the hub for the proper spelling of every name; a directory is its own name.
        huggingface._ID_CACHE[source.location] = source.location
    with _explained(source):
        nn = TransformersModel(
            source.location,
            revision=source.revision,
            task="text-generation",
            tokenizer=tokenizer or _no_tokenizer(),
        )
    return Model(description, nn, tokenizer, AS_SERVED, "server", UNKNOWN_WEIGHTS)


def wrap(module: Any, tokenizer: Any = None, description: Description | None = None) -> Model:
    """Use a causal language model that is already loaded; it is put in evaluation mode.

    Raises:
        UnsupportedModel: a family or a configuration that cannot be decomposed exactly.
    """
    from nnsight import TransformersModel

    module.eval()
    if description is None:
        name = module.config.name_or_path or type(module).__name__
        description = Description(Source(name, name), module.config, structure_of(module), None)
    first = next(module.parameters())
    nn = TransformersModel(module, tokenizer=tokenizer or _no_tokenizer(), task="text-generation")
    dtype = str(first.dtype).removeprefix("torch.")
    return Model(description, nn, tokenizer, dtype, str(first.device), _fingerprint(module))


def _module(description: Description, dtype: str, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    source = description.source
    with _explained(source):
        module, found = AutoModelForCausalLM.from_pretrained(
            source.location, dtype=getattr(torch, dtype), output_loading_info=True, **source.arguments
        )
    if missing := sorted(found["missing_keys"]):
        raise SelfRepairError(
            f"the files of model {source.name!r} lack {len(missing)} of its weights (for example {missing[0]}): "
            "they would be random; give the files that belong to its configuration"
        )
    return module.to(device)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used here ({error.args[0]}); try cpu") from error
    return name


def _no_tokenizer() -> Any:
    """nnsight asks for a tokenizer even when only token ids are ever traced."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


def _fingerprint(module: Any) -> str:
    """A hash over a sample of every parameter: tells two sets of weights of one shape apart, quickly."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].double().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _explained(source: Source):
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
        if source.gguf_file or Path(source.location).is_dir():
            raise SelfRepairError(f"model {source.name!r} could not be loaded: {one_line(error)}") from error
        raise UsageError(
            f"no model {source.name!r}: it is not embedded ({', '.join(EMBEDDED)}), not a directory here, "
            f"and the hub did not give it ({one_line(error)})"
        ) from error
