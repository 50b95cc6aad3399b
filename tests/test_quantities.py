"""One row a quantity: stores, jobs, plans and graphs follow from it; a new one is a row and where it is computed."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

import selfrepair_nn as sr
from selfrepair_nn import graph, quantities
from selfrepair_nn.errors import SelfRepairError, UsageError
from selfrepair_nn.estimating.traffic import result_bytes, traffic
from selfrepair_nn.layout.experiment import prepare
from selfrepair_nn.layout.sweep import Sweep, plans
from selfrepair_nn.options import Options
from selfrepair_nn.quantities import ASKED, QUANTITIES, SOURCES, SWEEP, TOKEN, WHEN, Quantity
from selfrepair_nn.tracing import decompose, jobs
from selfrepair_nn.tracing.session import run_session

SMALL = {"tokens": 128, "length": 16, "batch_size": 4}
ALWAYS = {
    *("selected", "done", "logit", "mean_logit", "target_constant", "norm_scale", "direct_effect"),
    *("ablated_direct_effect", "logit_change", "mean_logit_change", "self_repair", "from_heads", "from_mlps"),
    *("from_norm", "norm_on_existing", "norm_on_change", "ablated_norm_scale", "closure", "noise_floor", "threshold"),
}
COMPONENTS = {"component_direct_effect", "component_change"}
NEURONS = {
    *("mlp_direct_effect", "mlp_change", "top_neuron", "top_neuron_change", "top_neuron_direct_effect"),
    *("neuron_direct_effect", "neuron_change"),
}
NORMS = {"residual_norm", "ablated_residual_norm"}
ESTIMATES = {"estimate", "half_width", "prompts_used", "layer_estimate", "layer_half_width"}
GRAPHS = {
    "sums": ("sr.Graph(ablate=HEADS)", {}, set()),
    "full": ('sr.Graph(ablate=HEADS, record="full")', {"components": "all"}, COMPONENTS),
    "neurons": ("sr.Graph(ablate=HEADS, neurons=7)", {}, NEURONS),
    "falling": (
        'sr.Graph(ablate=HEADS, neurons=7, also="falling_neuron")',
        {},
        NEURONS | {f"falling_neuron{end}" for end in ("", "_change", "_direct_effect")},
    ),
    "norm": ("sr.Graph(ablate=HEADS, residual_norm=True)", {}, NORMS),
    "also": ('sr.Graph(ablate=HEADS, also="residual_norm")', {}, NORMS),
    "attention": ("sr.Graph(ablate=HEADS, attention=(0, 2, 3))", {}, {"attention"}),
    "reinforced": (
        'sr.Variants("scale", {k: sr.Graph(ablate=HEADS, replacement=sr.Reinforce(k)) for k in (0.5, 1.0)})',
        {},
        {"inserted_direct_effect"},
    ),
    "cases": (
        "sr.Graph(ablate=((sr.Head(6, 0), sr.Mlp(7)), (sr.Neuron(5, 3),)), record='full', neurons=6)",
        {},
        COMPONENTS | NEURONS,
    ),
    "variants": (
        'sr.Variants("ablation", {r: sr.Graph(ablate=HEADS, replacement=r, neurons=5, also=["residual_norm"]) '
        'for r in ("zero", "identity", "mean")})',
        {},
        NEURONS | NORMS,
    ),
    "selected": ("sr.Graph(ablate=HEADS)", {"select": "top-share", "share": 0.2}, set()),
    "estimated": ("sr.Graph(ablate=HEADS)", {"until_ci": 0.5}, ESTIMATES),
    "float64": ("sr.Graph(ablate=HEADS)", {"dtype": "float64"}, set()),
    "strongest": ("sr.Graph(ablate=HEADS, strongest=2)", {}, set()),
}


def recipe(folder: Path, body: str) -> str:
    path = folder / "own.py"
    heads = 'sr.sweep(sr.select_heads(None, "6.1,6.3,7.3", s.n_layers, s.n_heads))'
    lines = ['"""Mine."""', "import selfrepair_nn as sr", "FIGURES = ()", "def graph(s, options):"]
    path.write_text("\n".join([*lines, f"    return {body.replace('HEADS', heads)}", ""]))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name): the recipe, the choices and the path of a run of one of GRAPHS."""

    @cache
    def run(name):
        folder = tmp_path_factory.mktemp(name)
        body, choices, _ = GRAPHS[name]
        choices = {"model": "tiny-neox"} | SMALL | choices
        given = recipe(folder, body)
        sr.run(given, out=folder / "own.zarr", progress=False, check=False, **choices)
        return given, choices, folder / "own.zarr"

    return run


@pytest.mark.parametrize("name", GRAPHS)
def test_a_store_holds_what_its_graph_records_and_nothing_else(made, name):
    ds = xr.open_zarr(made(name)[2])
    assert set(ds.data_vars) == ALWAYS | GRAPHS[name][2]


@pytest.mark.parametrize("name", GRAPHS)
def test_labels_are_there_when_their_rows_say(made, name):
    given, choices, path = made(name)
    experiment = prepare(given, Options(**choices))
    rows = {each.name for each in quantities.recorded(experiment.records, "label")}
    assert set(xr.open_zarr(path).coords) == rows | ({experiment.work.axis} - {None})


@pytest.mark.parametrize("name", GRAPHS)
def test_the_plan_foretells_the_size_of_the_store(made, name):
    """To the byte; where heads are yet to be found, the most that it can be."""
    given, choices, path = made(name)
    group = zarr.open_group(path, mode="r")
    held = sum(group[name].nbytes for name in xr.open_zarr(path).data_vars)
    foretold = sr.preview(given, **choices)["store_bytes"]
    assert foretold == held if name != "strongest" else foretold >= held


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", ["full", "neurons", "cases", "variants"])
def test_it_is_foretold_how_much_comes_back(made, name, precision):
    """To the byte, and as if all tokens were top tokens where only these come back."""
    given, choices, _ = made(name)
    model = sr.load("tiny-neox", dtype=precision, check=False)
    experiment = prepare(given, Options(**choices | {"dtype": precision}))
    units = Sweep(experiment, plans(experiment, model.layout), {}, None).units([slice(1, 3)])
    for unit in units:
        if unit.plan["replacement"]["kind"] != "mean":
            found = run_session(unit.job, model.nn, unit.arrays, unit.plan)
            assert result_bytes(unit, precision) == sum(each.nbytes for each in found.values())


def test_a_plan_foretells_how_much_comes_back_of_all_units(made):
    given, choices, _ = made("full")
    every, top = (prepare(given, Options(**choices | {"components": c})) for c in ("all", "top"))
    assert not every.shared
    assert top.shared
    assert traffic(top)["result_bytes"] == traffic(every)["result_bytes"]
    tokens = every.prompts.n * (every.prompts.length - 1)
    values = 4 + len(every.work.components) + 3 * (7 + len(every.work.components))
    assert traffic(every)["result_bytes"] == 4 * tokens * values


@pytest.mark.parametrize("name", sorted({*GRAPHS} - {"strongest"}))
def test_dimensions_are_as_long_as_the_work_says(made, name):
    given, choices, path = made(name)
    sizes = prepare(given, Options(**choices)).work.sizes
    found = xr.open_zarr(path).sizes
    assert {d: sizes[d] for d in found} == dict(found)


def test_every_number_that_is_recorded_is_written(made):
    for name in ("norm", "attention", "cases", "variants"):
        ds = xr.open_zarr(made(name)[2])
        for each in {*GRAPHS[name][2]} - {"neuron_change", "neuron_direct_effect"}:
            values = ds[each].where(ds.selected) if "layer" in ds[each].dims else ds[each]
            assert np.isfinite(values).any(), each


def test_both_ways_to_ask_record_the_same(made):
    one, other = (xr.open_zarr(made(name)[2]) for name in ("norm", "also"))
    xr.testing.assert_identical(one.drop_attrs(), other.drop_attrs())


def test_every_row_is_of_a_known_source_and_condition():
    assert {q.source for q in QUANTITIES.values()} == set(SOURCES)
    assert {q.when for q in QUANTITIES.values()} == {*WHEN, *ASKED}
    assert "residual_norm" in ASKED


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_for_is_called_after_one_of_its_rows(name):
    """A misspelt condition would be one more thing to ask for."""
    assert QUANTITIES[name].when == name


@pytest.mark.parametrize(
    ("also", "said"),
    [
        ("residual", "also 'residual' is not known; choose one of residual_norm, stream_distance"),
        (("residual_norm", "logit"), "also 'logit' is not known"),
        (("residual_norm", 3), "also 3 is not known"),
        (3, "Graph"),
    ],
)
def test_what_cannot_be_recorded_is_refused_with_what_can(also, said):
    with pytest.raises(UsageError, match=said):
        sr.Graph(ablate=sr.sweep([sr.Head(0, 0)]), also=also)


def test_what_is_asked_for_twice_or_in_another_order_is_the_same_graph():
    plain = sr.Graph(ablate=sr.sweep([sr.Head(0, 0)]))
    assert replace(plain, also=["residual_norm"] * 2) == replace(plain, also="residual_norm")
    assert replace(plain, also="residual_norm").digest != plain.digest


def test_stores_of_before_are_still_their_graphs():
    """What says whose a store is has not changed by there being more to ask for."""
    heads = sr.sweep([sr.Head(1, 2), sr.Head(3, 0)])
    assert sr.Graph(ablate=heads).digest == "100102f0c826f86a"
    more = sr.Graph(
        ablate=heads, record="full", residual_norm=True, attention=(1,), replacement=sr.Scale(0.5)
    )
    assert more.digest == "bd50de042943c53e"


def test_variants_record_the_same():
    plain = sr.Graph(ablate=sr.sweep([sr.Head(0, 0)]))
    with pytest.raises(UsageError, match="must share also"):
        sr.Variants("mine", {"a": plain, "b": replace(plain, also="residual_norm")})


@pytest.mark.parametrize("replacements", [("zero", sr.Reinforce(1.0)), (sr.Reinforce(0.0), "identity")])
def test_heads_are_not_reinforced_in_some_variants_only(replacements):
    """They are read at one position of each prompt, ablated ones at all."""
    first, second = (sr.Graph(ablate=sr.sweep([sr.Head(0, 0)]), replacement=r) for r in replacements)
    with pytest.raises(UsageError, match="must all reinforce heads or none: 'b' does not do"):
        sr.Variants("mine", {"a": first, "b": second})


NEW = (
    Quantity(
        "largest", "clean", TOKEN, "1", "largest entry", "Largest entry of the final stream.", when="largest"
    ),
    Quantity(
        "ablated_largest", "ablated", SWEEP, "1", "ablated", "The same of the ablated run.", when="largest"
    ),
)


@pytest.fixture
def larger(monkeypatch):
    """A new quantity: two rows, and a line each where the job reads the clean and the ablated stream."""
    rows = (*quantities._ALL, *NEW)
    monkeypatch.setattr(quantities, "_ALL", rows)
    monkeypatch.setattr(graph, "ASKED", (*ASKED, "largest"))
    for row in NEW:
        monkeypatch.setitem(QUANTITIES, row.name, row)
    clean, ablated = decompose.clean_readout, decompose.ablated_readout

    def of_clean(block):
        final = block.clean["input"][block.plan["model"]["n_layers"]]
        return clean(block) | ({"largest": final.amax(-1)} if "largest" in block.plan["gives"] else {})

    def of_ablated(changes, batch, block, state):
        new = {"ablated_largest": changes["final"].amax(-1)}
        found = ablated(changes, batch, block, state)
        return found | (new if "ablated_largest" in block.plan["gives"] else {})

    monkeypatch.setattr(jobs, "clean_readout", of_clean)
    monkeypatch.setattr(jobs, "ablated_readout", of_ablated)


def test_a_new_quantity_is_its_rows_and_where_it_is_computed(larger, made, tmp_path):
    given = recipe(tmp_path, 'sr.Graph(ablate=HEADS, replacement="identity", also=("largest",))')
    choices = {"model": "tiny-neox"} | SMALL
    path = tmp_path / "new.zarr"
    ds = sr.run(given, out=path, progress=False, check=False, **choices)
    assert set(ds.data_vars) == ALWAYS | {"largest", "ablated_largest"}
    assert ds.largest.dims == TOKEN
    assert ds.ablated_largest.dims == SWEEP
    assert ds.largest.attrs == NEW[0].attributes
    assert float(ds.largest.min()) > 0
    done = ds.ablated_largest.where(ds.selected, drop=False).stack(head_=SWEEP[:2])[
        ..., ds.selected.values.ravel()
    ]
    np.testing.assert_allclose(done, ds.largest.expand_dims(head_=done.head_, axis=-1), rtol=1e-5)
    assert sr.preview(given, **choices)["store_bytes"] == sum(ds[name].nbytes for name in ds.data_vars)
    assert "| `largest` | prompt, position | 1 | Largest entry" in quantities.table()


def test_a_quantity_that_no_job_gives_is_named(monkeypatch, larger, tmp_path):
    monkeypatch.setattr(jobs, "clean_readout", decompose.clean_readout)
    given = recipe(tmp_path, 'sr.Graph(ablate=HEADS, replacement="zero", also="largest")')
    with pytest.raises(SelfRepairError, match=r"it holds .*not .*'largest'"):
        sr.run(given, model="tiny-neox", out=tmp_path / "x.zarr", progress=False, check=False, **SMALL)


def test_a_quantity_of_another_shape_is_named(monkeypatch, larger, tmp_path):
    given = recipe(tmp_path, 'sr.Graph(ablate=HEADS, replacement="zero", also="largest")')
    ablated = jobs.ablated_readout
    monkeypatch.setattr(
        jobs,
        "ablated_readout",
        lambda *given: {
            name: torch.stack([value] * 2, -1) if name == "ablated_largest" else value
            for name, value in ablated(*given).items()
        },
    )
    with pytest.raises(SelfRepairError, match=r"ablated_largest has shape \(3, 4, 15, 2\), not \(3, 4, 15\)"):
        sr.run(given, model="tiny-neox", out=tmp_path / "x.zarr", progress=False, check=False, **SMALL)
