"""From a user's choices to everything a run needs to know, before any weight is loaded."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from selfrepair_nn.components import Head
from selfrepair_nn.errors import UsageError
from selfrepair_nn.execution.plan import Work, default_block
from selfrepair_nn.models.load import Description, Model, describe, load_tokenizer
from selfrepair_nn.options import Options
from selfrepair_nn.prompts import SAMPLE, Prompts, load_partners, load_prompts, partners, token_texts
from selfrepair_nn.recipe import Recipe, find_recipe
from selfrepair_nn.variables import CLEAN, COMPONENT, SWEPT

SAMPLE_TOKENS = 16_384


@dataclass(frozen=True)
class Experiment:
    """A recipe, applied: what is run on which prompts. `partners` is None where nothing is resampled."""

    recipe: Recipe
    options: Options
    description: Description
    tokenizer: Any
    prompts: Prompts
    partners: np.ndarray | None
    work: Work

    @property
    def heads(self) -> tuple[Head, ...]:
        """The ablated heads, in the order of the cases."""
        return tuple(case[0] for case in self.work.graph.ablate)

    @property
    def layers(self) -> list[int]:
        return sorted({h.layer for h in self.heads})

    @property
    def head_indices(self) -> list[int]:
        return sorted({h.head for h in self.heads})

    @property
    def dtype(self) -> str:
        """What the model computes in."""
        given = self.options.model
        return given.dtype if isinstance(given, Model) else self.options.dtype

    @property
    def precision(self) -> str:
        """The store's floating-point type: the model's, but at least float32."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def path(self) -> Path:
        """Where the store is, or will be."""
        out = Path(self.options.out).expanduser()
        name = Path(self.description.source.name).name.removesuffix(".gguf")
        return out if out.suffix == ".zarr" else out / f"{self.recipe.name}-{name}.zarr"

    @property
    def settings(self) -> dict[str, Any]:
        """What decides every number in the store: two runs with the same settings are the same run."""
        o = self.options
        return {
            "recipe": self.recipe.name,
            "model": self.description.source.name,
            "revision": self.description.revision,
            "dtype": self.dtype,
            "prompts": self.prompts.sha256,
            "partners": None
            if self.partners is None
            else sha256(self.partners.astype("<i8").tobytes()).hexdigest(),
            "heads": [h.label for h in self.heads],
            "graph": self.work.graph.digest,
            "ablation": o.ablation,
            "target": o.target,
            "value_bias": o.value_bias,
            "freeze": o.freeze,
            "components": o.components,
            "share": o.share if o.components == "top" else None,
            "mean_prompts": min(o.mean_prompts, self.prompts.n) if o.ablation == "mean" else None,
        }

    def coordinates(self) -> dict[str, Any]:
        """Labels of the store's dimensions."""
        tokens, n = self.prompts.tokens, self.prompts.n
        texts = token_texts(self.tokenizer, tokens)
        found = {
            "layer": self.layers,
            "head": self.head_indices,
            "prompt": np.arange(n),
            "position": np.arange(self.prompts.length - 1),
            "token": tokens[:, :-1],
            "target": tokens[:, 1:],
            "token_text": texts[:, :-1],
            "target_text": texts[:, 1:],
            "document": self.prompts.document,
            "partner": np.full(n, -1) if self.partners is None else self.partners,
            "ablation": self.work.graph.replacement,
        }
        if self.work.graph.record == "full":
            terms = self.work.components
            found |= {
                "component": [c.label for c in terms],
                "component_kind": [c.kind for c in terms],
                "component_layer": [c.layer for c in terms],
                "component_head": [c.head for c in terms],
            }
        return found

    def data(self) -> dict[str, np.ndarray | None]:
        """Names of the store's arrays, with the values that are known beforehand."""
        names = [
            "done",
            *CLEAN,
            *SWEPT,
            "noise_floor",
            *(COMPONENT if self.work.graph.record == "full" else ()),
        ]
        return {"selected": self.selected} | dict.fromkeys(names)

    @property
    def selected(self) -> np.ndarray:
        """bool [layer, head], along the store's dimensions."""
        wanted = set(self.heads)
        return np.array([[Head(layer, h) in wanted for h in self.head_indices] for layer in self.layers])

    def on_grid(self, values: np.ndarray) -> np.ndarray:
        """From [case, …] to [layer, head, …], NaN where a head is not part of the run."""
        grid = np.full((*self.selected.shape, *values.shape[1:]), np.nan, dtype=values.dtype)
        grid[self.selected] = values
        return grid

    def arrays(self, block: slice) -> dict[str, Any]:
        """The token ids that a job on these prompts takes."""
        import torch

        found = {"tokens": torch.from_numpy(self.prompts.tokens[block].copy())}
        if self.partners is not None:
            found["partner_tokens"] = torch.from_numpy(self.prompts.tokens[self.partners[block]])
        return found


def prepare(recipe: str, options: Options) -> Experiment:
    """Read the model's configuration and the prompts, and lay out the work. No weight is loaded, nothing is written.

    Raises:
        UsageError, SelfRepairError: as the rooms that read models, prompts and specifications say.
    """
    found = find_recipe(recipe)
    options = found.options(options)
    if isinstance(options.model, Model):
        description, tokenizer = options.model.description, options.model.tokenizer
    else:
        description = describe(options.model, options.revision)
        tokenizer = load_tokenizer(description.source)
    graph = found.graph(description.structure, options)
    prompts = _prompts(options, description, tokenizer)
    block = min(options.batch_size or default_block(prompts.length), prompts.n)
    work = Work(graph, description.structure, prompts.n, prompts.length, block, options.rows)
    return Experiment(found, options, description, tokenizer, prompts, _partners(options, prompts.n), work)


def _prompts(options: Options, description: Description, tokenizer: Any) -> Prompts:
    sample = isinstance(options.prompts, str) and options.prompts == SAMPLE
    return load_prompts(
        options.prompts,
        tokenizer,
        tokens=options.tokens or (SAMPLE_TOKENS if sample else None),
        length=options.length,
        bos=options.bos,
        split=options.split,
        column=options.column,
        revision=options.prompts_revision,
        vocab_size=description.structure.vocab_size,
        max_length=description.structure.max_length,
    )


def _partners(options: Options, n: int) -> np.ndarray | None:
    if options.ablation != "resample":
        if options.partners is not None:
            raise UsageError(
                f"partners are for resample ablation: leave them out with ablation {options.ablation!r}"
            )
        return None
    return partners(n, options.seed) if options.partners is None else load_partners(options.partners, n)
