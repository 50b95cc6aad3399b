"""Which tokens of the vocabulary a part of a model promotes: by the logit lens of what it writes."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.components import Ablatable, Neuron
from selfrepair_nn.errors import UsageError
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.models.model import Model, evaluating
from selfrepair_nn.models.plain import drawn_tokens
from selfrepair_nn.prompts import token_texts
from selfrepair_nn.values import ids


def write_words(model: Model, sites: Iterable[Ablatable], tokens: Any = None, words: int = 10) -> xr.Dataset:
    """Which tokens each of some sites promotes and demotes most, over (site, word); no weights are read.

    promoted and demoted are token ids, promoted_text and demoted_text their texts, promoted_effect and demoted_effect
    what happens to their logits, less the mean over the vocabulary, before a soft cap.

    Args:
        model: a loaded model, as `load` or `wrap` gives it.
        sites: heads, attention layers, MLPs or neurons.
        tokens: ids [prompt, position]: the lens is of the mean over them of what the site writes under the clean
            norm's scale, in logits. None, for neurons alone: of what one unit of activation writes, in logits times
            that scale.
        words: how many tokens of either end.

    Raises:
        UsageError: no sites, one that the model does not have, or no tokens for what is no neuron.
    """
    from selfrepair_nn.tracing.averages import words_job
    from selfrepair_nn.tracing.session import run_session

    every = tuple(sites)
    graph = Graph(ablate=sweep(every), replacement="zero", words=words)
    if not every or not graph.words:
        raise UsageError("write_words: name at least one site, and at least one word")
    if problem := graph.beyond(model.structure) or graph.misfit(model.structure):
        raise UsageError(f"write_words: {problem}: the model does not have that")
    if tokens is None and not all(isinstance(site, Neuron) for site in every):
        raise UsageError("write_words: only neurons write the same whatever is read: give tokens, [prompt, position]")
    import torch

    read = drawn_tokens(model) if tokens is None else torch.as_tensor(ids("tokens", tokens, "[prompt, position]"))
    plan = graph.plan(model.layout) | {"tokens_per_pass": 1, "unit": tokens is None}
    with evaluating(model):
        found: Any = run_session(words_job, model.nn, {"tokens": read, "partner_tokens": read}, plan)
    values = {name: (("site", "word"), value.numpy()) for name, value in found.items()}
    for end in ("promoted", "demoted"):
        values[f"{end}_text"] = ("site", "word"), token_texts(model.tokenizer, values[end][1])
    return xr.Dataset(values, {"site": [site.label for site in every], "word": np.arange(words)})
