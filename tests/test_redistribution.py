"""What a live softmax gives back of what edges carried: by naive code, with its intervals, and in the recipe."""

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.confidence import Estimate, Tally
from selfrepair_nn.errors import UsageError
from selfrepair_nn.simulate import simulate_heads

VARIED = ("ablated_direct_effect", "logit_change", "self_repair")
HEADS, PROMPTS, POSITIONS = (3, 4), 30, 12


def made(seed=0, back=0.3, prompts=PROMPTS):
    """A store whose edges carry most of the direct effect, of which so much is given back, and by chance."""
    rng = np.random.default_rng(seed)
    ds, parts = simulate_heads(*HEADS, prompts, POSITIONS, seed=seed), []
    for given in (0.0, back):
        noise = 0.1 * rng.normal(size=ds.direct_effect.shape)
        after = ds.direct_effect * (0.2 + 0.8 * given) + noise
        change = after - ds.direct_effect + 0.3 * rng.normal(size=ds.direct_effect.shape)
        parts.append(ds.assign(ablated_direct_effect=after, logit_change=change))
        parts[-1]["self_repair"] = change - after + ds.direct_effect
    axis = xr.Variable("softmax", ["frozen", "live"])
    names = [n for n, x in ds.data_vars.items() if x.dims == ds.self_repair.dims and n != "direct_effect"]
    found = ds.drop_vars(names).assign(xr.concat([one[names] for one in parts], axis))
    paid = np.linspace(0.2, 0.9, 12).reshape(HEADS)[..., None, None] + 0.05 * rng.normal(size=ds.direct_effect.shape)
    both = (("softmax", *ds.direct_effect.dims), np.stack([paid, paid]))
    told = {"ablation": "knockout_frozen_most_1, knockout_live_most_1"}
    return found.assign(edge_attention=both).assign_coords(document=("prompt", np.arange(prompts))).assign_attrs(told)


def test_by_naive_code():
    ds, share = made(), 0.1
    found, keep = sr.edges_by_head(ds, share), int(0.1 * PROMPTS * POSITIONS)
    ratios = []
    for layer, head in np.ndindex(*HEADS):
        one = ds.isel(layer=layer, head=head)
        effect = one.direct_effect.values.ravel()
        frozen, live = (one.sel(softmax=s) for s in ("frozen", "live"))
        values = {
            "edge_attention": frozen.edge_attention,
            "carried": one.direct_effect - frozen.ablated_direct_effect,
            "redistributed": live.ablated_direct_effect - frozen.ablated_direct_effect,
            "logit_redistributed": live.logit_change - frozen.logit_change,
            "self_repair": frozen.self_repair,
        }
        top = np.argsort(-effect, kind="stable")[:keep]
        at = found.isel(layer=layer, head=head)
        for name, each in values.items():
            flat = each.values.ravel().astype(float)
            assert_allclose(at[name], flat.mean(), rtol=1e-6, atol=1e-9)
            assert_allclose(at[f"top_{name}"], flat[top].mean(), rtol=1e-6, atol=1e-9)
        given = [values[n].values.ravel().astype(float)[top].sum() for n in ("redistributed", "carried")]
        assert_allclose(at.top_given_back, given[0] / given[1], rtol=1e-6)
        assert bool(at.concentrated) == (values["edge_attention"].values.mean() >= 0.5)
        ratios.append(given[0] / given[1])
    few = found.concentrated
    assert 0 < int(few.sum()) < 12
    assert_allclose(found.concentrated_top_carried, found.top_carried.where(few).mean(), rtol=1e-9)
    ratio = found.top_redistributed.where(few).sum() / found.top_carried.where(few).sum()
    assert_allclose(found.concentrated_top_given_back, ratio, rtol=1e-9)
    assert abs(ratio - 0.3) < 0.1
    assert sr.edges_by_head(found).identical(found)


def test_the_interval_of_a_ratio_holds_it():
    """Of means of prompts that differ, 95% of intervals hold the ratio of the true means."""
    rng, held = np.random.default_rng(1), []
    counts = rng.integers(1, 9, (400, 40)).astype(float)
    level = rng.normal(size=counts.shape)
    below = counts * (2 + level)
    above = counts * (0.6 + 0.5 * level) + 0.4 * counts * rng.normal(size=counts.shape)
    one, other = (Tally(sums, counts).estimate for sums in (above, below))
    ratio = one.over(other)
    assert_allclose(ratio.mean, above.sum(1) / below.sum(1))
    held = np.abs(ratio.mean - 0.3) <= ratio.half_width
    assert 0.925 <= held.mean() <= 0.985
    nothing = one.over(Estimate(np.zeros(400), other.influence, other.shares))
    assert not np.isfinite(nothing.half_width).any()


def test_too_few_prompts_have_no_interval():
    found = sr.edges_by_head(made(prompts=8), 0.1)
    assert np.isinf(found.concentrated_top_given_back_half_width)
    assert isinstance(figures.draw("attention_edges", made(prompts=8), share=0.1).axes[0].get_title(loc="left"), str)


def test_other_stores_have_no_edges():
    for ds in (simulate_heads(), made().sel(softmax=["live"]), made().drop_vars("edge_attention")):
        with pytest.raises(UsageError, match=r"run attention_edges|edge_attention"):
            sr.edges_by_head(ds)


@pytest.fixture(scope="module")
def stored(wrapped, seeded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edges")

    def run(**choices):
        out = folder / f"{len(list(folder.iterdir()))}.zarr"
        choices = {"prompts": seeded("neox-parallel", 6, 10), "heads": "0.1,2.0", "out": out} | choices
        return sr.run("attention_edges", model=wrapped("neox-parallel", exact=True), progress=False, **choices).load()

    return run


def test_the_recipe(stored, wrapped):
    """Edges of three kinds; what is paid along them is what the heads pay; frozen, nothing else has moved."""
    for edges, count in (("most", 1), ("previous", 2), ("first", 1)):
        ds = stored(param={"edges": edges, "count": count})
        assert {*ds["softmax"].values} == {"frozen", "live"}
        paid = ds.edge_attention.transpose("softmax", ...).values[:, ds.selected.values]
        assert paid.shape[1] == 2
        assert_allclose(paid[0], paid[1])
        assert float(paid.min()) >= 0
        assert float(paid.max()) <= 1 + 1e-9
        if edges == "first":
            assert_allclose(paid[..., 0], 1)
        if edges == "previous":
            assert not paid[..., 0].any()
        found = sr.edges_by_head(ds, 0.2)
        assert float(np.abs(found.redistributed).max()) > 1e-3
        assert len(figures.draw("attention_edges", ds, share=0.2).axes) == 2
    with pytest.raises(UsageError, match="edges 'hot', count 1: choose edges of most, previous, first"):
        stored(param={"edges": "hot"})
    assert figures.suited(ds) == ["attention_edges"]


def test_what_is_paid_to_the_last_token_is_what_attention_says(wrapped, seeded, tmp_path):
    """Two ways to the same number."""
    (tmp_path / "mine.py").write_text(
        "import selfrepair_nn as sr\n"
        "def graph(s, o):\n"
        "    heads = sr.sweep([sr.Head(1, 0), sr.Head(2, 1)])\n"
        "    return sr.Graph(heads, sr.KnockOut(back=1), attention=(1,), also='edge_attention')\n"
    )
    choices = {"prompts": seeded("llama-gqa"), "out": tmp_path / "x.zarr", "progress": False}
    ds = sr.run(tmp_path / "mine.py", model=wrapped("llama-gqa", exact=True), **choices).load()
    assert_allclose(ds.edge_attention.where(ds.selected), ds.attention.sel(distance=1).where(ds.selected), atol=1e-12)
    with pytest.raises(UsageError, match="edge_attention is that of one head along the edges"):
        sr.Graph(sr.sweep([sr.Head(1, 0)]), "zero", also="edge_attention")


def test_the_figure_says_how_many_heads_and_what_is_given_back():
    ds = made()
    found = sr.edges_by_head(ds, 0.1)
    drawn = figures.draw("attention_edges", ds, share=0.1)
    told = drawn.axes[0].get_title(loc="left")
    assert told.startswith(f"{int(found.concentrated.sum())} heads that attend to few tokens:\n")
    assert f"{float(found.concentrated_top_given_back):.0%}" in told
    [blue] = [c for c in drawn.axes[0].containers if c.lines[0].get_color() == figures.style.colour(0)]
    shown = found.concentrated & (found.top_carried > found.top_carried_half_width)
    shown &= found.top_given_back_half_width <= 0.6
    assert 0 < int(shown.sum()) < int(found.tokens.size)
    assert_allclose(blue.lines[0].get_xdata(), found.edge_attention.values[shown.values])
    assert len(figures.draw("attention_edges", {"a": ds, "b": made(1)}, share=0.1).axes) == 4
