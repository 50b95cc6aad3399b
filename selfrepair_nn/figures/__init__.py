"""Figures of a store, one per file: each says itself what it is called, what it shows and what it suits.

`draw` draws one by name, `save` writes it, `plot` does both for several. Datasets are a store, a list of stores, or a
mapping from legend to them; a summary by `analysis.by_head` stands for its store where nothing else is needed.
Recipes may draw figures of their own (`drawing.figure`): those of ours are known by name as all others are, those of a
user's recipe where its file is given. `variants` and `cases` are the overview of what any recipe made.
`paper_comparison` stands apart: its second dataset ships with the package.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import xarray as xr
from matplotlib.figure import Figure, SubFigure

from selfrepair_nn.analysis import held, in_nats, remembering
from selfrepair_nn.choosing import splits, tail_of, viewed
from selfrepair_nn.drawing import Drawing
from selfrepair_nn.errors import SelfRepairError, UsageError, one_line
from selfrepair_nn.face import public
from selfrepair_nn.figures import (
    ablation_kinds,
    attention_edges,
    backups,
    cases,
    clamping,
    contrast,
    direct_effect_vs_logit_change,
    distance_by_layer,
    erasure_neurons,
    freeze,
    freeze_norms,
    hydra,
    induction,
    interactions,
    ioi,
    layer_order,
    layer_position,
    neuron_changes,
    neuron_consistency,
    neuron_sparsity,
    norm_scale,
    norm_share,
    optimal,
    outcomes,
    path_patching,
    reinforced_heads,
    reinforcement_nulls,
    repair_graph,
    repair_map,
    residual_norm,
    routing,
    self_reinforcement,
    self_repair_by_layer,
    stages,
    suiting,
    token_noise,
    training,
    variance_components,
    variants,
    words,
)
from selfrepair_nn.figures.look import formats_of, looking, save, settings
from selfrepair_nn.figures.style import Datasets, named, share_of, summaries
from selfrepair_nn.hub import is_address
from selfrepair_nn.paths import local
from selfrepair_nn.progress import in_notebook
from selfrepair_nn.quantities import OUTCOMES, asked_in
from selfrepair_nn.recipe import Recipe, find_recipe, present_name, recipe_paths, recipes
from selfrepair_nn.shown import line, tell
from selfrepair_nn.values import brief, nearest, one_of, several

__all__ = [
    "FIGURES",
    "beside",
    "draw",
    "drawn",
    "known",
    "note_unknown",
    "own",
    "plot",
    "require_figures",
    "save",
    "suited",
]

FIGURES: dict[str, Drawing] = {
    module.draw.name: module.draw
    for module in (
        self_repair_by_layer,
        direct_effect_vs_logit_change,
        distance_by_layer,
        token_noise,
        norm_share,
        variance_components,
        repair_map,
        repair_graph,
        outcomes,
        words,
        erasure_neurons,
        neuron_sparsity,
        neuron_changes,
        neuron_consistency,
        induction,
        ioi,
        contrast,
        norm_scale,
        residual_norm,
        ablation_kinds,
        freeze,
        freeze_norms,
        path_patching,
        routing,
        optimal,
        attention_edges,
        self_reinforcement,
        reinforced_heads,
        reinforcement_nulls,
        layer_position,
        layer_order,
        hydra,
        stages,
        interactions,
        clamping,
        backups,
        training,
        variants,
        cases,
    )
}

Name = str | Drawing


def known(recipe: Recipe | None = None) -> dict[str, Drawing]:
    """Every figure that has a name here, by name: ours, those of our recipes, and those of this recipe's own file.

    Raises:
        UsageError: the recipe calls a figure of its own as another one is called.
    """
    found = FIGURES | {name: each for one in recipes() for name, each in one.drawings.items()}
    if recipe is None:
        return found
    for name in recipe.drawings:
        if name in FIGURES:
            raise UsageError(
                f"recipe {str(recipe.path)!r} defines a figure {name}, and there is another of that name: rename it"
            )
    return found | dict(recipe.drawings)


def suited(datasets: Datasets, recipe: Recipe | None = None) -> list[str]:
    """The names of the figures for which each of these datasets holds enough; the overview where there is no other.

    Those of a recipe's own file are among them where that is given. UsageError if there is no dataset.
    """
    stores = named(datasets).values()
    found = [each for each in known(recipe).values() if all(map(each.suits, stores))]
    return [each.name for each in found if not each.overview] or [each.name for each in found]


def require_figures(names: Iterable[Name] | Name, recipe: Recipe | None = None) -> tuple[Drawing, ...]:
    """The figures of these names, or these themselves. UsageError unless each is one."""
    listed: Any = (names,) if isinstance(names, Drawing) else several(names)
    every = known(recipe)
    found: list[Drawing] = []
    for name in (names,) if listed is None else tuple(listed):
        if not isinstance(name, Drawing) and (not isinstance(name, str) or name not in every):
            raise UsageError(f"no figure {brief(name)}{nearest(name, every)}; there are {', '.join(every)}")
        found.append(name if isinstance(name, Drawing) else every[name])
    return tuple(found)


def own(ds: xr.Dataset, recipe: Recipe | None = None) -> tuple[str, ...]:
    """The figures of a recipe, or those that a store names as its own, as far as they suit it.

    Where one is not known here the overview is drawn in its place; where there is none, all that suits.
    An older store names none: it has those of our recipe of that name. Nothing but names is taken from a store: what
    it says of its recipe is neither imported nor run.
    """
    note_unknown(ds, recipe)
    every, names = known(recipe), recipe.figures if recipe else _named_by(ds)
    found = [name for name in names if name in every and every[name].suits(ds)]
    if not found:
        return tuple(suited(ds, recipe))
    overview = [each.name for each in every.values() if each.overview and each.suits(ds)]
    missing = any(name not in every for name in names)
    return tuple(dict.fromkeys([*found, *(overview if missing else ())]))


def _named_by(ds: xr.Dataset) -> Sequence[str]:
    try:
        names = json.loads(ds.attrs["figures"])
    except (KeyError, TypeError, ValueError, RecursionError):
        name = present_name(ds.attrs.get("recipe"))
        return find_recipe(name).figures if name in recipe_paths() else ()
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def note_unknown(ds: xr.Dataset, recipe: Recipe | None = None) -> None:
    """Say on stderr which figures that a store names are not known here, or which of a recipe's own do not suit."""
    every, names = known(recipe), recipe.figures if recipe else _named_by(ds)
    if missing := [name for name in names if name not in every]:
        told = ", ".join(line(name, 60) for name in missing[:3])
        tell(
            f"figure {told} is none of ours: if the recipe's file draws it, give that, --recipe FILE.py, in Python "
            "recipe=…; the others are drawn"
        )
    for name in recipe.drawings if recipe else ():
        if not every[name].suits(ds):
            tell(f"figure {name} does not suit this store: it needs {every[name].need.words}")


def draw(
    name: Name, datasets: Datasets, *, share: float | None = None, recipe: Recipe | None = None
) -> Figure:
    """Draw the figure of this name from one dataset or several; `share` as in `analysis.by_head`.

    Raises:
        UsageError: no figure of this name; a dataset that does not hold what it needs; datasets of which some count
            every token and some do not, and no share; or a figure of a recipe's own that fails.
    """
    [figure] = require_figures([name], recipe)
    found: Any = None
    why: Exception | None = None
    try:
        with settings():
            found = figure.draw(named(datasets), share=share_of(datasets, share))
    except Exception as error:
        why = error
    for title, ds in named(datasets).items():
        if (why or "done" in ds) and not figure.suits(ds):
            raise _unsuited(figure, title, ds, why) from why
    if why and figure.name not in FIGURES and not isinstance(why, SelfRepairError):
        raise UsageError(f"figure {figure.name} fails: {one_line(why)}") from why
    if why:
        raise why
    if not isinstance(found, Figure | SubFigure):
        raise UsageError(f"figure {figure.name} gives {brief(found)}, not a matplotlib Figure")
    return cast(Figure, found)


def _unsuited(figure: Drawing, title: str, ds: xr.Dataset, why: Exception | None) -> UsageError:
    told = f" ({why})" if isinstance(why, UsageError) else ""
    if asked_in(ds) == "logprob" and not figure.nats:
        others = ", ".join(suited(ds)) or "none"
        return UsageError(f"figure {figure.name} is of logits alone; of log-probability {title!r} has {others}")
    return UsageError(
        f"figure {figure.name} does not suit {title!r}: it needs {figure.need.words}{told}; "
        f"suited are {', '.join(suited(ds)) or 'none'}"
    )


def drawn(
    datasets: Datasets,
    names: Iterable[Name] | Name | None = None,
    *,
    share: float | None = None,
    recipe: Recipe | None = None,
    chosen: bool = True,
) -> Iterator[tuple[Drawing, Figure]]:
    """Figures, and what each draws, by default of all that the datasets are `suited` to.

    Stores are summarised once for all. Errors as in `draw`; of figures that nobody has `chosen` by name, those are
    left out, and told, that cannot be of the tokens that were chosen.
    """
    stores, share = named(datasets), share_of(datasets, share)
    wanted = require_figures(suited(stores, recipe) if names is None else names, recipe)
    plain = all(map(suiting.grid, stores.values()))
    found = summaries(stores, share) if plain and any(each.of_summary for each in wanted) else stores
    other = not (chosen and names is not None) and any(tail_of(ds) != "top" or splits(ds) for ds in stores.values())
    for each in wanted:
        try:
            figure = draw(each, found if each.of_summary else stores, share=share, recipe=recipe)
        except UsageError as error:
            if not other:
                raise
            tell(f"leaves out {each.name}: {error}")
        else:
            yield each, figure


@public
def plot(
    datasets: Datasets,
    directory: str | Path | None = None,
    names: Iterable[str] | None = None,
    *,
    share: float | None = None,
    recipe: str | Path | None = None,
    outcome: str = "logit",
    tail: str | None = None,
    split_selection: bool | None = None,
    against: str | None = None,
    formats: Any = ("png", "svg"),
    size: Any = None,
    caption: bool = True,
    axes: Any = None,
) -> Any:
    """Draw figures by name, by default those that the first store's recipe names.

    With a `directory` they are saved there, in each of the `formats` ("png", "svg", "pdf"), and the files' paths are
    returned, a list of Path. Without one they are shown, in a notebook, and returned, a list of matplotlib Figures.
    `size` is a figure's width and height in inches, and `caption=False` leaves out the small print; what `warnings` say
    stays. `axes` are matplotlib axes in whose place the one figure that is named is drawn. Fonts, sizes and colours
    that the caller has set in matplotlib are kept. `recipe` is a recipe's
    name or the path of your own: then its figures are drawn, those that its file defines among them. `outcome`
    "logprob" draws log-probability in place of logits, in the figures that can, of stores that hold it. `tail` and
    `split_selection` as in `choose_tokens`. `against` is what changes of the logit are set against, where a figure does
    so: "removed", DE - DE', what the ablation takes away (the default, but for zero ablation), or "direct-effect", DE,
    as in the paper. Errors as in `draw` and `analysis.in_nats`, and as for a recipe's file that cannot be read as one;
    UsageError for a format, a size or axes that cannot be.
    """
    one_of("outcome", outcome, OUTCOMES)
    endings = formats_of(formats)
    asked = {name: in_nats(ds) if outcome == "logprob" else ds for name, ds in named(datasets).items()}
    stores = {name: held(viewed(ds, tail, split_selection, against)) for name, ds in asked.items()}
    found = None if recipe is None else find_recipe(recipe)
    first = next(iter(stores.values()))
    wanted = own(first, found) if names is None and (found or outcome == "logit") else names
    if axes is not None and (directory is not None or len(require_figures(names or (), found)) != 1):
        raise UsageError("axes are for one figure: name it, names=\"…\", and leave out the directory")
    with remembering(), looking(size, caption, axes):
        every = drawn(stores, wanted, share=share, recipe=found, chosen=names is not None)
        if directory is None:
            return _shown([figure for _, figure in every], axes)
        folder, ending = local(directory, "directory"), "_logprob" if outcome == "logprob" else ""
        return [path for each, figure in every for path in save(figure, folder, each.name + ending, endings)]


def _shown(figures: list[Figure], axes: Any) -> list[Figure]:
    """The figures, shown where this is a notebook; of one in the place of axes the whole that it is a part of."""
    if axes is not None:
        if isinstance(figures[0], Figure):
            raise UsageError("this figure makes one of its own: it cannot be drawn in the place of axes")
        return [axes.figure]
    if in_notebook():
        display = import_module("IPython.display").display
        for figure in figures:
            display(figure)
    return figures


def require_own(recipe: Recipe, options: Any) -> list[str]:
    """What is to be said, before a run, of the figures that could not be drawn after it.

    Raises:
        UsageError: the recipe calls a figure of its own as another one is called.
    """
    every = known(recipe)
    said = [
        f"figure {line(name, 60)}, which the recipe names, is none of ours and none of its own{nearest(name, every)}"
        for name in recipe.figures
        if name not in every
    ]
    needing = [n for n in recipe.figures if n in every and every[n].every_token]
    if needing and options.selects == "top-share":
        left_out = "--select all" if options.until_ci is None else "leave --until-ci out"
        said.append(
            f"{', '.join(needing)} cannot be drawn from this run: every token is needed, and it keeps each head's top "
            f"share; to draw it, {left_out}"
        )
    return said


def beside(ds: xr.Dataset) -> Path:
    """The directory of a store's figures: its path without .zarr; of a store of the hub its name, here.

    It is "figures" for what comes from no store.
    """
    source = ds.encoding.get("source") or "figures.zarr"
    store = Path(Path(source).name if is_address(source) else source)
    return store.with_suffix("") if store.suffix == ".zarr" else store.with_name(f"{store.name}-figures")
