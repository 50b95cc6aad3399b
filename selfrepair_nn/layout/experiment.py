"""From a user's choices to everything a run needs to know, before any weight is loaded."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np

from selfrepair_nn.case_sites import written
from selfrepair_nn.components import Head
from selfrepair_nn.constants import Constants
from selfrepair_nn.door import requested, require_same_graphs
from selfrepair_nn.errors import UsageError
from selfrepair_nn.graph import Graph, Variants, of_model
from selfrepair_nn.layout.packing import SERVED_TOKENS, TOKENS_PER_PASS, served_block
from selfrepair_nn.layout.plan import Work, default_block
from selfrepair_nn.models.load import accepted, describe, load_tokenizer
from selfrepair_nn.models.model import AS_SERVED, Description, Model
from selfrepair_nn.naming import Request, Sizes
from selfrepair_nn.options import Options
from selfrepair_nn.prompts import (
    Prompts,
    load_partners,
    several_partners,
    shuffled_targets,
    text_prompts,
    token_texts,
)
from selfrepair_nn.quantities import (
    MOVERS,
    QUANTITIES,
    RANKS,
    VARIANCE,
    Quantity,
    recorded,
    usual_share,
    varied,
)
from selfrepair_nn.recipe import Recipe


@dataclass(frozen=True)
class Experiment:
    """A recipe, applied: what is run on which prompts.

    `partners` are [prompt], or [resample, prompt] where each has several, None where nothing is resampled; they are
    rows. `order` [prompt] is the place in the text of each prompt, whose rows may be shuffled.
    `asked` are the graphs as the recipe gave them. Those of `work` are the same, but may be left with fewer heads, or
    have what was learned.
    """

    request: Request
    options: Options
    description: Description
    tokenizer: Any
    prompts: Prompts
    order: np.ndarray
    partners: np.ndarray | None
    asked: tuple[Graph, ...]
    work: Work

    @property
    def recipe(self) -> Recipe:
        return self.request.recipe

    @property
    def graph(self) -> Graph:
        """The graph, or the first of the variants: what they share."""
        return self.work.graphs[0]

    @property
    def grid(self) -> bool:
        """Whether results lie on a grid of layers and heads; otherwise along `case`."""
        return self.graph.heads_only

    @property
    def heads(self) -> tuple[Head, ...]:
        """The ablated heads of a grid, in the order of the cases."""
        return cast(tuple[Head, ...], tuple(case[0] for case in self.graph.ablate))

    @property
    def undecided(self) -> bool:
        """Whether a clean pass has yet to find the heads that are ablated."""
        return self.graph.undecided

    def of(self, heads: Sequence[Head]) -> "Experiment":
        """The same with only these of its heads, the strongest first, and what follows from them."""
        variants = {label: graph.of(heads) for label, graph in self.work.variants.items()}
        return replace(self, work=replace(self.work, variants=variants))

    def in_units_of(self, block: int) -> "Experiment":
        """The same with so many prompts in a unit."""
        return replace(self, work=replace(self.work, block=block))

    @property
    def bytes_of_token(self) -> int:
        """What comes back of each token, before compression: what the store keeps, but of every partner."""
        work = replace(self.work, moments=False)
        found = work.store_bytes(recorded(self.records), self.precision)
        return found // (work.prompts * work.length)

    @property
    def layers(self) -> list[int]:
        """The layers in which something is ablated first."""
        return sorted({_first_layer(case) for case in self.graph.ablate})

    @property
    def dtype(self) -> str:
        """What the model computes in; only a server knows what it does."""
        return self.request.dtype

    @property
    def precision(self) -> str:
        """The store's floating-point type: the model's, but at least float32."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def path(self) -> Path:
        """Where the store is, or will be."""
        return self.request.path

    @property
    def ablation(self) -> str:
        """What the variants replace by, as one word, or several where they differ."""
        return ", ".join(dict.fromkeys(graph.ablation for graph in self.work.graphs))

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
            "heads": self.asked[0].labels,
            "graph": [self.work.axis, *(graph.digest for graph in self.asked)],
            "ablation": self.ablation,
            "target": self.graph.target,
            "value_bias": self.graph.value_bias,
            "freeze": o.freeze,
            "components": o.components,
            **({"words": o.words} if o.words else {}),
            "logprob": None if o.logprob == "none" else o.logprob,
            "share": self.share if self.shared or self.ranked else None,
            "mean_prompts": min(o.mean_prompts, self.prompts.n) if self.reads_means else None,
            "seed": o.seed if self.draws else None,
            "select": "top-share" if self.selective else None,
            "until_ci": None if o.until_ci is None else [o.until_ci, o.ci_of],
            "resamples_as": "moments" if self.work.moments else None,
        }

    @property
    def idle(self) -> list[str]:
        """The options that were chosen and change nothing here."""
        o = self.options
        derangement = self.partners is not None and o.partners is None
        random = derangement or self.draws or o.until_ci is not None or self.recipe.make_prompts is not None
        chosen = {
            "seed": o.seed != 0 and not random,
            "mean_prompts": o.mean_prompts != type(o).mean_prompts and not self.reads_means,
            "share": o.share is not None and not (self.shared or self.ranked),
            "logprob": o.logprob != "none" and "logprob" not in self.graph.also,
            "resamples_as": o.resamples_as != type(o).resamples_as and self.work.resamples == 1,
            "words": o.words > 0 and not self.graph.words,
        }
        return [name for name, without in chosen.items() if without]

    @property
    def reads_means(self) -> bool:
        """Whether mean values are found before the first block."""
        return any(graph.replaced_by.reads_means for graph in self.work.graphs)

    @property
    def learns(self) -> bool:
        """Whether constants are learned before the first block, on half of the prompts."""
        return any(graph.replaced_by.learns for graph in self.work.graphs)

    def learned(self, constants: Constants) -> "Experiment":
        """The same where these constants are what was to be learned."""
        variants = {
            label: replace(graph, replacement=constants) if graph.replaced_by.learns else graph
            for label, graph in self.work.variants.items()
        }
        return replace(self, work=replace(self.work, variants=variants))

    @property
    def draws(self) -> bool:
        """Whether what is done follows from the seed, beside partners."""
        return self.shuffles or any(graph.replaced_by.draws for graph in self.work.graphs)

    @property
    def reinforces(self) -> bool:
        return any(graph.reinforces for graph in self.work.graphs)

    @property
    def shared(self) -> bool:
        """Whether what is large is kept for each head's top share of tokens only."""
        o, graph = self.options, self.graph
        full, nats = graph.record == "full", "logprob" in graph.also
        return (
            of_top_tokens(graph)
            or (full and o.components == "top")
            or (nats and (self.selective or (o.logprob != "all" and o.components != "all")))
        )

    @property
    def share(self) -> float:
        """The share of each head's tokens that is meant where only the top ones are ablated, kept or averaged."""
        return usual_share(self.prompts.all_count) if self.options.share is None else self.options.share

    @property
    def unembedded(self) -> int:
        """How many tokens go through the unembedding, at most, where log-probability or words are measured; else none.

        Of log-probability each once in the clean run, and three times for each case that keeps it; of words only
        these: its clean logits, what the sites write, their change and all that changes, and each component's change.
        """
        work, nats = self.work, "logprob" in self.graph.also
        kept = (self.share if self.shared else 1) * work.case_tokens
        times = 3 * nats + (4 + MOVERS) * (self.graph.words > 0)
        return nats * len(work.graphs) * work.prompts * work.length + round(times * kept)

    @property
    def counted(self) -> np.ndarray:
        """Which tokens count: bool [prompt, position]; of prompts on which heads are reinforced the edited one."""
        if not self.reinforces:
            return self.prompts.counts
        edited = np.arange(self.prompts.length - 1) == self.edited_position[:, None]
        return edited & self.prompts.counts

    def top(self, effects: np.ndarray, limits: np.ndarray, block: slice) -> np.ndarray:
        """Which tokens that count reach each case's limit: bool [case, prompt, position] of a block's effects."""
        return (effects >= limits[:, None, None]) & self.counted[block]

    @property
    def selective(self) -> bool:
        """Whether only each head's top share of tokens is ablated and kept."""
        return self.options.selects == "top-share"

    @property
    def ranked(self) -> bool:
        """Whether a clean pass over all prompts, whose direct effects are kept, ranks each head's tokens beforehand."""
        return self.selective or self.options.until_ci is not None

    @property
    def vocabulary(self) -> np.ndarray:
        """The token ids whose logits the run measures."""
        measured = [self.prompts.tokens] if self.prompts.other is None else [self.prompts.tokens, self.prompts.other]
        return np.unique(np.concatenate([each.ravel() for each in measured]))

    @property
    def edited_position(self) -> np.ndarray:
        """A counted position for each prompt, drawn evenly from a seed: where a head is reinforced."""
        counts = self.prompts.counts
        drawn = np.random.default_rng(self.options.seed).integers(0, np.maximum(counts.sum(1), 1))
        counted_first = np.argsort(~counts, axis=1, kind="stable")
        return counted_first[np.arange(self.prompts.n), drawn]

    @property
    def shuffles(self) -> bool:
        """Whether a shuffled target is asked about beside the target."""
        return "shuffled_target" in self.graph.also

    def shuffled_positions(self, block: slice | np.ndarray) -> np.ndarray:
        """Whose target stands for each position's, from the seed: [prompt, position]; the last token keeps its own."""
        tokens, places = self.prompts.tokens[block], self.order[block]
        drawn = [shuffled_targets(row[1:], self.options.seed, int(at)) for row, at in zip(tokens, places, strict=True)]
        return np.concatenate([drawn, np.full((len(drawn), 1), self.prompts.length - 1)], 1)

    def random_directions(self, block: slice | np.ndarray) -> np.ndarray:
        """Vectors of length 1, as wide as the residual stream, from the seed, one a prompt: [prompt, d_model]."""
        width, places = self.description.structure.d_model, self.order[block]
        drawn = [np.random.default_rng((self.options.seed, int(place))).standard_normal(width) for place in places]
        return np.array([each / np.linalg.norm(each) for each in drawn], self.precision)

    def noise_seeds(self, block: slice | np.ndarray) -> np.ndarray:
        """A number for each prompt, from the seed and its place in the text: int64 [prompt]."""
        places = self.order[block].tolist()
        drawn = [np.random.SeedSequence((self.options.seed, place)).generate_state(1, np.uint64) for place in places]
        return np.concatenate(drawn).view(np.int64)

    @property
    def records(self) -> frozenset[str]:
        """The conditions for a quantity to be recorded (quantities.WHEN, ASKED) that the run fulfils."""
        fulfilled = {
            "other": self.prompts.other is not None,
            "counterfactual": self.prompts.counterfactual is not None,
            "estimated": self.options.until_ci is not None,
            "resampled": self.work.resamples > 1,
        }
        model = of_model(vars(self.description.structure), self.graph.record)
        asked = model.union(*(graph.records for graph in self.work.graphs))
        return asked | {name for name, given in fulfilled.items() if given}

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """What the store holds beside its labels; of moments no indices, which have none."""
        found = recorded(self.records)
        if not self.work.moments:
            return found
        numbers = tuple(q for q in found if not q.ablated or q.kind == "float")
        return numbers + tuple(QUANTITIES[f"{q.name}{VARIANCE}"] for q in numbers if varied(q))

    def coordinates(self) -> dict[str, Any]:
        """Labels of the store's dimensions."""
        tokens, n = self.prompts.tokens, self.prompts.n
        texts = token_texts(self.tokenizer, tokens)
        found = self._sites() | {
            "prompt": self.order,
            "position": np.arange(self.prompts.length - 1),
            "token": tokens[:, :-1],
            "target": tokens[:, 1:],
            "token_text": texts[:, :-1],
            "target_text": texts[:, 1:],
            "counted": self.counted,
            "document": self.prompts.document,
            "partner": np.full(n, -1) if self.partners is None else self.order[self.partners],
            "ablation": self.ablation,
        }
        if self.shuffles:
            places = self.shuffled_positions(slice(None))[:, :-1]
            found["shuffled_target"] = np.take_along_axis(tokens[:, 1:], places, 1)
        if self.prompts.counterfactual is not None:
            found["counterfactual"] = self.prompts.counterfactual[:, :-1]
            found["counterfactual_text"] = token_texts(self.tokenizer, found["counterfactual"])
        if self.prompts.other is not None:
            found["other"] = self.prompts.other
            found["other_text"] = token_texts(self.tokenizer, self.prompts.other)
        if self.reinforces:
            found["edited_position"] = self.edited_position
        if self.work.axis:
            found[self.work.axis] = self.work.labels
        if self.work.resamples > 1:
            found["resample"] = np.arange(self.work.resamples)
        return found | self._requested()

    def _sites(self) -> dict[str, Any]:
        if self.grid:
            layers, heads = self.layers, self._head_indices
            labels = [[Head(layer, head).label for head in heads] for layer in layers]
            return {"layer": layers, "head": heads, "head_label": labels}
        cases = self.graph.ablate
        return {
            "case": self.graph.labels,
            "case_sites": [written(case) for case in cases],
            "case_layer": [_first_layer(case) for case in cases],
        }

    def _requested(self) -> dict[str, Any]:
        """Labels of what the graph records beyond the sums."""
        found: dict[str, Any] = {}
        if "named" in self.graph.records:
            terms = self.work.components
            found |= {
                "component": [c.label for c in terms],
                "component_kind": [c.kind for c in terms],
                "component_layer": [c.layer for c in terms],
                "component_head": [c.head for c in terms],
            }
        if self.graph.neurons is not None:
            neurons = self.description.structure.d_mlp
            found |= {"neuron": np.arange(neurons), "rank": np.arange(min(RANKS, neurons))}
        if self.graph.words:
            ids = np.arange(self.description.structure.vocab_size)
            found |= {"word": np.arange(self.graph.words), "changed": np.arange(min(MOVERS, len(self.work.components)))}
            found |= {"vocabulary": ids, "vocabulary_text": token_texts(self.tokenizer, ids)}
        if "routing" in self.graph.also:
            layers = np.repeat(self.description.structure.routed, self.description.structure.n_choices)
            found |= {"choice": np.arange(len(layers)), "choice_layer": layers}
        if self.graph.attention:
            found["distance"] = list(self.graph.attention)
        return found

    def data(self) -> dict[str, np.ndarray | None]:
        """Names of the store's arrays, with the values that are known beforehand."""
        return {each.name: None for each in self.quantities} | {"selected": self.selected}

    @property
    def _head_indices(self) -> list[int]:
        return sorted({h.head for h in self.heads})

    @property
    def selected(self) -> np.ndarray:
        """bool [layer, head] or [case], along the store's dimensions: what is part of the run."""
        if not self.grid:
            return np.ones(len(self.graph.ablate), bool)
        layers, heads = self.layers, self._head_indices
        found = np.zeros((len(layers), len(heads)), bool)
        rows = np.searchsorted(layers, [h.layer for h in self.heads])
        found[rows, np.searchsorted(heads, [h.head for h in self.heads])] = True
        return found

    def on_grid(self, values: np.ndarray) -> np.ndarray:
        """From [case, …] to [layer, head, …], filled where a head is not part of the run; as it is without a grid."""
        if not self.grid:
            return values
        fill = np.nan if np.issubdtype(values.dtype, np.floating) else -1
        grid = np.full((*self.selected.shape, *values.shape[1:]), fill, dtype=values.dtype)
        grid[self.selected] = values
        return grid

    def as_read(self, block: slice) -> dict[str, Any]:
        """What `arrays` gives for the prompts at these places in the text, in whatever order the rows are."""
        return self.arrays(np.argsort(self.order)[block])

    def arrays(self, block: slice | np.ndarray, graph: Graph | None = None) -> dict[str, Any]:
        """The token ids, and what goes with them, that a job on these prompts takes; one that ablates, by a graph."""
        import torch

        p = self.prompts
        found = {"tokens": p.tokens[block]}
        if graph is not None:
            found |= graph.replaced_by.arrays(self, block)
        if p.other is not None:
            found["other"] = p.other[block]
        if self.shuffles:
            found["shuffled_positions"] = self.shuffled_positions(block)
        return {name: torch.from_numpy(values.copy()) for name, values in found.items()}


def of_top_tokens(graph: Graph) -> bool:
    """Whether something is recorded that is only ever kept for top tokens."""
    return graph.neurons is not None or graph.words > 0 or "routing" in graph.also


def _first_layer(case: tuple[Any, ...]) -> int:
    return min(site.layer for site in case)


def prepare(recipe: str | os.PathLike[str], options: Options) -> Experiment:
    """Read the model's configuration and the prompts, and lay out the work. No weight is loaded, nothing is written.

    Raises:
        UsageError, SelfRepairError: as the rooms that read models, prompts and specifications say.
    """
    found, options = requested(recipe, options)
    options = replace(options, model=accepted(options.model))
    given = options.model if isinstance(options.model, Model) else None
    description = given.description if given else describe(cast(str, options.model), options.revision)
    structure = description.structure
    sizes = Sizes(structure.n_layers, structure.n_heads, structure.max_length)
    dtype = AS_SERVED if options.served else given.dtype if given else options.dtype
    request = Request(found, options, description.source.name, sizes, dtype)
    drawn = found.graph(structure, options)
    found.require_taken(structure, options, drawn)
    require_same_graphs(request, drawn)
    tokenizer = given.tokenizer if given else load_tokenizer(description.source)
    prompts = found.prompts(structure, tokenizer, options) or text_prompts(structure, tokenizer, options)
    axis, graphs = _variants(drawn, prompts, options.served)
    if of_top_tokens(graphs[next(iter(graphs))]) and "all" in (options.components, options.logprob):
        name = "components" if options.components == "all" else "logprob"
        said = "neurons, words and routing are kept for the top share of tokens"
        raise UsageError(f"{said}: choose {name} 'top' or 'none'")
    block = min(options.batch_size or default_block(prompts.length), prompts.n)
    tokens = options.tokens_per_pass or (SERVED_TOKENS if options.served else TOKENS_PER_PASS)
    lent = _partners(options, prompts.n, list(graphs.values()))
    resamples = 1 if lent is None or lent.ndim == 1 else len(lent)
    moments = resamples > 1 and options.resamples_as == "moments"
    work = Work(axis, graphs, structure, prompts.n, prompts.length, block, tokens, resamples, moments)
    _require_statistics(options, work)
    order = _order(options, prompts.n)
    if lent is not None:
        lent = np.argsort(order)[lent[..., order]]
    asked = tuple(work.graphs)
    found = Experiment(request, options, description, tokenizer, prompts.taken(order), order, lent, asked, work)
    if options.served and not options.batch_size:
        return found.in_units_of(served_block(work, found.bytes_of_token))
    return found


def _order(options: Options, n: int) -> np.ndarray:
    """The prompts in the order of the text, or shuffled by the seed where some may be enough."""
    rows = np.arange(n)
    return rows if options.until_ci is None else np.random.default_rng(options.seed).permutation(rows)


def _require_statistics(options: Options, work: Work) -> None:
    """Some runs have no mean over a top share of tokens that could be selected or estimated."""
    if options.selects == "all" and options.until_ci is None:
        return
    if any(graph.reinforces for graph in work.graphs):
        raise UsageError("reinforced heads are read at one position: leave out --select and --until-ci")
    single = work.graph.heads_only and work.graph.then is None
    if options.until_ci is not None and (work.axis or not single):
        raise UsageError(
            "--until-ci estimates the self-repair of single heads under one ablation, as the heads recipe does: "
            "leave it out here"
        )


def _variants(found: Graph | Variants, prompts: Prompts, served: bool) -> tuple[str | None, dict[Any, Graph]]:
    """The axis and its graphs; the target is the difference where the prompts name what is subtracted."""
    graphs = found.graphs if isinstance(found, Variants) else {"": found}
    if prompts.other is not None:
        graphs = {label: replace(graph, target="difference") for label, graph in graphs.items()}
    for graph in graphs.values():
        if graph.replaced_by.learns and served:
            raise UsageError(
                f"ablation {graph.ablation!r}: a server has no gradients: learn where the weights are, with "
                "sr.optimal_constants, save that, and ablate by sr.Constants.load(FILE)"
            )
        if reason := graph.replaced_by.amiss(prompts):
            raise UsageError(f"ablation {graph.ablation!r}: {reason}")
        if graph.target == "difference" and prompts.other is None:
            raise UsageError('target "difference" needs prompts that name the other token: define prompts()')
    return (found.axis if isinstance(found, Variants) else None), dict(graphs)


def _partners(options: Options, n: int, graphs: Sequence[Graph]) -> np.ndarray | None:
    if not any(graph.replaced_by.reads_partner for graph in graphs):
        for name, given in (("partners", options.partners is not None), ("resamples", options.resamples > 1)):
            if given:
                raise UsageError(
                    f"{name} are for resample ablation, which reads another prompt: leave them out with ablation "
                    f"{graphs[0].ablation!r}"
                )
        return None
    if options.partners is None:
        found = several_partners(n, options.seed, options.resamples)
        return found if len(found) > 1 else found[0]
    found = load_partners(options.partners, n)
    rows = 1 if found.ndim == 1 else len(found)
    if options.resamples not in (1, rows):
        raise UsageError(
            f"resamples {options.resamples}, but the partners given are {rows}: leave --resamples out, or give as many "
            "rows, [resample, prompt]"
        )
    return found
