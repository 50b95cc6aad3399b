"""A model as jobs take it: a module that was loaded here or handed in, with all that wraps it, ready for nnsight."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from selfrepair_nn.errors import UnsupportedModel, UsageError
from selfrepair_nn.models.architectures import Structure, structure_of
from selfrepair_nn.models.kinds import reading, task_of

AS_SERVED = "as served"
PLAIN = (None, "eager")
"""How experts compute one by one, in every dtype and on every device."""


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
    """A loaded model: `nn` is the nnsight model that jobs run on, `tokenizer` is None where there is none.

    `given` is the module as it was handed in, with what wraps it; None where the weights are on a server.
    """

    description: Description
    nn: Any
    tokenizer: Any
    dtype: str
    device: str
    given: Any = None

    @property
    def name(self) -> str:
        return self.description.source.name

    @property
    def module(self) -> Any:
        """The Hugging Face module that is decomposed."""
        return self.nn._module

    @property
    def served(self) -> bool:
        return self.given is None

    @property
    def structure(self) -> Structure:
        return self.description.structure

    @property
    def devices(self) -> list[str]:
        """Every device that holds a part of it: several where it is spread out."""
        return sorted({str(x.device) for x in self.module.parameters() if not x.is_meta})

    @property
    def layout(self) -> dict[str, Any]:
        """What travels with a job of it."""
        return layout_of(self.structure, spread=self.served or len(self.devices) > 1)


def layout_of(structure: Structure, spread: bool = True) -> dict[str, Any]:
    """A structure as the plain dict that travels with a job; and whether several devices may hold the model."""
    return asdict(structure) | {"spread": spread}


def wrap(module: Any, tokenizer: Any = None, description: Description | None = None) -> Model:
    """Use a causal language model that is already loaded: it stays on its device and keeps its dtype.

    Args:
        module: a Hugging Face model, also with PEFT adapters or compiled, or an nnsight model of one.
        tokenizer: its tokenizer; an nnsight model brings its own.

    Raises:
        UsageError: no model, or one without its weights.
        UnsupportedModel: a family or a configuration that cannot be decomposed exactly.
    """
    given, tokenizer = _out_of_nnsight(module, tokenizer)
    given = _alone(given)
    inner = _unadapted(given)
    if description is None:
        name = inner.config.name_or_path or type(inner).__name__
        description = Description(Source(name, name), inner.config, structure_of(inner), None)
    from nnsight import TransformersModel

    nn = TransformersModel(inner, **reading(task_of(inner), tokenizer), **_placed(inner))
    return Model(description, nn, tokenizer, _coarsest(inner), _device_of(inner), given)


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Within, the model is in evaluation mode, and its experts compute in a way that works for its dtype and device.

    Afterwards every module is as it was before.

    Raises:
        UsageError: autocast is on, under which the model would not compute in its own dtype.
    """
    import torch

    kind = torch.device(model.device).type if not model.served else "cpu"
    if torch.is_autocast_enabled(kind):
        raise UsageError(
            f"autocast to {str(torch.get_autocast_dtype(kind)).removeprefix('torch.')} is on, and {model.name!r} is "
            f"{model.dtype}: leave torch.autocast, or load the model in that dtype"
        )
    training = [] if model.served else [part for part in model.given.modules() if part.training]
    for part in training:
        part.training = False
    chosen = choose_experts(model)
    try:
        yield
    finally:
        for config, how in chosen:
            config._experts_implementation = how
        for part in training:
            part.training = True


def choose_experts(model: Model) -> list[tuple[Any, str]]:
    """Let mixtures of experts compute as transformers chose if a pass does; otherwise expert by expert.

    Grouped products, its choice, have no float64, and want rows of certain lengths in other types. Returns the
    configurations that said otherwise, each with what it said.
    """
    parts = [] if model.served else model.given.modules()
    configs = {id(part.config): part.config for part in parts if hasattr(part, "config")}.values()
    chosen = [(c, how) for c in configs if (how := getattr(c, "_experts_implementation", None)) not in PLAIN]
    if not chosen or _passes(model):
        return []
    for config, _ in chosen:
        config._experts_implementation = "eager"
    return chosen


def _passes(model: Model) -> bool:
    import torch

    try:
        with torch.no_grad():
            model.given(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True


def release(model: Model) -> None:
    """Give back the memory of a model that was loaded here, and with which nothing is computed any more."""
    for x in [*model.module.parameters(), *model.module.buffers()]:
        x.data = x.data.new_empty(0)


def _out_of_nnsight(module: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The module of an nnsight model, with its weights, and its tokenizer; anything else as it is."""
    from nnsight import Envoy
    from torch import nn

    if isinstance(module, Envoy):
        if getattr(module, "_edits", None):
            raise UsageError(
                "this nnsight model carries edits, which would be left out: clear them with clear_edits(), or build "
                "what they do into the module"
            )
        if getattr(module, "dispatched", True) is False:
            module.dispatch()
        tokenizer = tokenizer or getattr(module, "tokenizer", None)
        module = module._module
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"model {module!r:.80} is no model: give a name, a directory, a Hugging Face module, "
            "or sr.wrap(module, tokenizer)"
        )
    return module, tokenizer


def _alone(module: Any) -> Any:
    """The module inside of what compiles it or copies it to several devices: it computes the same."""
    if (inner := getattr(module, "_orig_mod", None)) is not None:
        return _alone(inner)
    if type(module).__name__ in ("DataParallel", "DistributedDataParallel"):
        return _alone(module.module)
    return module


def _unadapted(module: Any) -> Any:
    """The Hugging Face module that PEFT's adapters are in, or the module itself."""
    if hasattr(module, "get_base_model"):
        if any(adapter.is_prompt_learning for adapter in module.peft_config.values()):
            raise UnsupportedModel(
                "this model has adapters that add virtual tokens (prompt learning): they are not decomposed"
            )
        module = module.get_base_model()
    if not hasattr(getattr(module, "config", None), "model_type"):
        raise UsageError(
            f"{type(module).__name__} is no Hugging Face causal language model: its configuration has no model_type"
        )
    return module


def _placed(module: Any) -> dict[str, Any]:
    """Where nnsight is to leave a module: where it is. Without this it moves it to the first GPU.

    Raises:
        UsageError: its weights are nowhere.
    """
    if getattr(module, "hf_device_map", None) is not None:
        return {}
    if bare := [name for name, x in module.named_parameters() if x.is_meta]:
        raise UsageError(
            f"this model is without (some of) its weights, for example {bare[0]}: load it whole, or with a device_map"
        )
    return {"device": next(module.parameters()).device}


def _device_of(module: Any) -> str:
    """Where the model takes its input; of a model that is spread out, where its first part computes."""
    spread = getattr(module, "hf_device_map", None)
    if not spread:
        return str(next(module.parameters()).device)
    found = [d for d in spread.values() if d not in ("disk", "meta")]
    first = next(iter(found), "cpu")
    return f"cuda:{first}" if isinstance(first, int) else str(first)


def _coarsest(module: Any) -> str:
    """The dtype that a model computes in: of its floating-point parameters the coarsest."""
    import torch

    kinds = {x.dtype for x in module.parameters() if x.is_floating_point() and x.element_size() > 1}
    coarsest = max(kinds or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)
    return str(coarsest).removeprefix("torch.")
