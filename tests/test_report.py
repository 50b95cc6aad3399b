"""The report holds the numbers, escapes what it did not write and needs nothing from outside."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr

from selfrepair_nn.analysis import by_head, by_layer, most_repaired
from selfrepair_nn.errors import UsageError
from selfrepair_nn.figures.look import captioned, new_figure
from selfrepair_nn.report import render, report
from selfrepair_nn.simulate import simulate_heads, unfinished
from selfrepair_nn.text import number, summary

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Text, attributes and tables of a page; fails on tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.attributes, self.text, self.tables = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1].append(data)


@pytest.fixture(scope="module")
def ds():
    return simulate_heads(4, 3, 8, 13, model="gpt2", seed=2)


@pytest.fixture(scope="module")
def page(ds):
    return render(ds)


def test_the_tables_hold_the_numbers(ds, page):
    layers, best, worst, every, variables = Page(page).tables
    expected = by_layer(ds)
    column = layers[0].index("self-repair")
    assert [row[column] for row in layers[1:]] == [number(v) for v in expected.top_self_repair.values]
    column = layers[0].index("norm share")
    assert [row[column] for row in layers[1:]] == [f"{v:.0%}" for v in expected.norm_share.values]
    ranked = most_repaired(ds, 10)
    column = best[0].index("self-repair")
    assert [row[column] for row in best[1:]] == [number(v) for v in ranked.top_self_repair.values]
    assert best[1][0] == f"L{ranked['layer'].values[0]}H{ranked['head'].values[0]}"
    assert worst[1][0] == every[1 + int(by_head(ds).top_self_repair.values.argmin())][0]
    assert len(every) == 1 + 12
    assert {row[0] for row in variables[1:]} == set(ds.variables)


def test_the_text_holds_the_facts(ds, page):
    text = " ".join(Page(page).text)
    for fact in (
        "gpt2, resample ablation",
        "12 heads",
        "104 tokens each",
        "8e-07 to 2e-06 logits",
        "centred target",
    ):
        assert fact in text
    assert "too few prompts for an interval" in text
    assert "Not finished" not in text


def test_the_figures_are_inside(page):
    images = [value for tag, name, value in Page(page).attributes if (tag, name) == ("img", "src")]
    assert len(images) == 5
    for image in images:
        kind, _, data = image.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert b"</svg>" in base64.b64decode(data)


def test_nothing_comes_from_outside(page):
    attributes = Page(page).attributes
    assert not [a for a in attributes if a[0] in ("link", "iframe") or a[1] == "href"]
    assert {a[1:] for a in attributes if a[0] == "script"} == {
        ("type", "application/json"),
        ("id", "explorer-stores"),
    }
    [policy] = [a[2] for a in attributes if a[1] == "content" and a[2].startswith("default-src 'none'")]
    assert "unsafe" not in policy
    assert "http" not in policy
    without = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "//" not in re.sub(r'src="data:[^"]*"', "", without)
    assert "@import" not in page
    assert "url(" not in page


def test_attributes_are_escaped(ds):
    evil = "<script>alert('x')</script>&\"$title"
    nested = json.dumps({evil: [evil, {"deep": evil}]})
    bad = ds.assign_attrs(model=evil, ablation=evil, target=evil, command=evil, provenance=nested)
    bad = bad.assign(logit=bad.logit.assign_attrs(description=evil))
    page = render(bad, store=evil, names="self_repair_by_layer")
    assert page.count("<script") == 2  # the explorer's data, and its script
    text = "".join(Page(page).text)
    assert text.count(evil) >= 6


def test_provenance_is_unfolded(ds, no_figures):
    nested = json.dumps({"git": {"commit": "abc123"}, "versions": {"numpy": "2.0"}, "layers": [1, 2]})
    page = render(ds.assign_attrs(provenance=nested, odd="{not json"))
    for shown in ("<dt>commit</dt><dd><code>abc123</code>", "<code>[1, 2]</code>", "<code>{not json</code>"):
        assert shown in page


def test_an_unfinished_run_says_so(ds, no_figures):
    part = unfinished(ds, done=np.arange(8) < 6)
    assert "Not finished: 75% of the run done." in render(part)


def test_the_snippet_opens_the_store(ds, tmp_path, monkeypatch, no_figures):
    ds.to_zarr(tmp_path / "my run.zarr", consolidated=False)
    opened = xr.open_zarr(tmp_path / "my run.zarr", consolidated=False, chunks=None)
    page = render(opened)
    assert str(tmp_path) not in page
    code = "".join(Page(page).text).partition("xarray alone:")[2].partition("What it holds")[0]
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    xr.testing.assert_allclose(found["ds"].load(), ds)


def test_the_file_is_the_same_each_time(ds, page, tmp_path):
    path = report(ds, tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html"
    assert path.read_text(encoding="utf-8") == page


def test_the_smallest_store_has_a_report(no_figures):
    Page(render(simulate_heads(1, 1, 2, 1)))


def test_bare_attributes_have_a_report(ds, no_figures):
    bare = ds.drop_vars("noise_floor")
    bare.attrs = {}
    assert "not measured" in render(bare)


def test_other_shares(ds, no_figures):
    assert "top 10% of tokens" in " ".join(render(ds, share=0.1).split())


def test_nothing_done_is_an_error(ds, tmp_path):
    with pytest.raises(UsageError, match="nothing done yet"):
        report(unfinished(ds, done=False), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_a_page_and_several_figures_sum_a_store_up_once(ds, tmp_path, monkeypatch):
    from selfrepair_nn import figures
    from selfrepair_nn.analysis import summaries

    calls, real = [], summaries.summed_up
    monkeypatch.setattr(summaries, "summed_up", lambda *given: calls.append(1) or real(*given))
    render(ds)
    assert len(calls) == 1
    figures.plot(ds, tmp_path)
    assert len(calls) == 2
    for share in (0.1, 0.2):
        by_head(ds, share)
    assert len(calls) == 4


def test_a_page_is_the_same_whether_or_not_anything_is_remembered(ds, monkeypatch, no_figures):
    page = render(ds)
    monkeypatch.setattr("selfrepair_nn.analysis.summaries.once", lambda _, ds, compute: compute())
    assert render(ds) == page


def test_several_stores_have_a_page_together(ds):
    """Figures of all, the summary of each, and the explorer of all."""
    stores = {"mine <i>": ds, "theirs": simulate_heads(4, 3, 30, 13, model="other", seed=5)}
    chosen = {"names": "self_repair_by_layer", "share": 0.1}
    text = render(stores, **chosen)
    said = "".join(Page(text).text)
    assert text.count("<figure>") == 1
    assert all(str(summary(each, 0.1)) in said for each in stores.values())
    assert "<i>" not in text
    data = re.search(r'id="explorer-stores">(.*?)</script>', text, re.DOTALL)[1]
    assert [each["name"] for each in json.loads(data)] == [*stores]
    three = render([*stores.values(), ds], share=0.1, names=())
    assert len(json.loads(re.search(r'id="explorer-stores">(.*?)</script>', three, re.DOTALL)[1])) == 3
    assert three.count("Open it, and where") == 3
    with pytest.raises(UsageError, match="leave it out"):
        render(stores, store="s.zarr", **chosen)
    with pytest.raises(UsageError, match="no dataset was given"):
        report([])


def test_figures_of_a_page_have_the_size_and_the_small_print_that_were_asked_for(ds, monkeypatch):
    def drawn(*_, **__):
        seen.append((captioned(), *new_figure(3, 2).get_size_inches()))
        return ()

    seen = []
    monkeypatch.setattr("selfrepair_nn.report.figures.drawn", drawn)
    render(ds)
    render(ds, size="9x5", caption=False)
    assert seen == [(True, 3, 2), (False, 9, 5)]
    with pytest.raises(UsageError, match="width and height in inches"):
        render(ds, size="large")
