"""The explorer in a real browser: clicks, keys, hover, links, several stores, hostile text, dark and narrow screens."""

import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn.simulate import simulate_heads, unfinished

REQUIRED = os.environ.get("SELFREPAIR_REQUIRE_BROWSER") == "1"
EVIL = "<img src=x onerror=hacked=1></script><script>hacked=1</script>\u202e\x1b"
HANGING = 300_000
"""Milliseconds after which a page hangs: many times more than anything here takes, on a machine that stalls."""

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 800}


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, or another that is installed, driven by Playwright."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        found = None
    if not found:
        reason = "THE EXPLORER WAS TRIED IN NO BROWSER: apt install chromium, pip install playwright"
        pytest.fail(reason) if REQUIRED else pytest.skip(reason)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, timeout=HANGING)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def ds():
    """A store whose most repaired head is L1H0, which L2H1 repairs, with somebody's words in its text."""
    ds = simulate_heads(3, 2, 60, 11, seed=4, components=True)
    texts = ds.token_text.values.copy()
    texts[0, 1] = EVIL
    targets = ds.target_text.values.copy()
    targets[0, 0] = EVIL
    return ds.assign_coords(
        token_text=ds.token_text.copy(data=texts), target_text=ds.target_text.copy(data=targets)
    )


@pytest.fixture(scope="module")
def variants(ds):
    """The same heads in two ways, the second with twice the self-repair; no components."""
    ds = ds.drop_vars("component_change")
    twice = {n: a * (2 if n == "self_repair" else 1) for n, a in ds.items() if a.dims == ds.logit_change.dims}
    own = {n: twice[n] for n in twice if n != "direct_effect"}
    stacked = {n: (("way", *a.dims), np.stack([ds[n].values, a.values]), ds[n].attrs) for n, a in own.items()}
    return ds.assign(stacked).assign_coords(way=["first", "second"])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(stores, write): their page, which is made once."""
    folder, made = tmp_path_factory.mktemp("pages"), []

    def page(stores, write):
        for known, how, path in made:
            if known is stores and how is write:
                return path
        path = write(stores, folder / f"{len(made)}.html", share=0.1)
        made.append((stores, write, path))
        return path

    return page


@pytest.fixture
def opened(browser, written):
    """opened(stores, size, scheme, at): the page in a browser, when it is ready; it tells no error, loads nothing."""
    told, contexts = [], []

    def shown(stores, size=WIDE, scheme="light", at="", write=sr.view):
        path = written(stores, write)
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme))
        contexts[-1].set_default_timeout(HANGING)
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: told.append(str(error)))
        tab.on("console", lambda message: told.append(message.text) if message.type == "error" else None)
        tab.on("request", lambda request: told.append(request.url) if request.url != tab.url else None)
        tab.goto(f"{path.as_uri()}{at}")
        tab.wait_for_selector("[data-ready]")
        told[:] = [each for each in told if each.partition("#")[0] != path.as_uri()]
        return tab

    yield shown
    for context in contexts:
        context.close()
    assert not told


def settled(tab):
    """The page, when all that depends on what was chosen is drawn."""
    tab.locator(".pane[aria-busy]").first.wait_for(state="detached")
    return tab


def chosen(tab, pane=0):
    return settled(tab).locator(".pane").nth(pane).locator(".cell[aria-selected=true]").get_attribute("aria-label")


def label(heads, layer, head):
    value = float(heads.top_self_repair[layer, head])
    return f"L{layer}H{head} {'−' if value < 0 else '+'}{abs(value):.3f}"


def test_words_of_a_head_and_of_a_token(opened, ds):
    """Somebody's words among them, which stay text."""
    shape = [ds.sizes[d] for d in ("layer", "head", "prompt", "position")]
    dims, rng = ("layer", "head", "prompt", "position", "changed", "word"), np.random.default_rng(0)
    own = {n: (dims[:4] + dims[5:], rng.integers(0, 3, (*shape, 2))) for n in ("promoted", "demoted")}
    own |= {f"{n}_effect": (v[0], rng.normal(size=v[1].shape)) for n, v in own.items()}
    own |= {f"change_{n}": (dims, rng.integers(0, 3, (*shape, 1, 2))) for n in ("promoted", "demoted")}
    own["changed_component"] = (dims[:5], np.full((*shape, 1), [*ds.component.values].index("L2H1")))
    own["changed_effect"] = (dims[:5], np.full((*shape, 1), 0.25))
    texts = ("vocabulary", np.array(["first", EVIL, "third"], object))
    tab = opened(ds.assign(own).assign_coords(vocabulary_text=texts, component=ds.component), at="#L1H0")
    assert "promotes" in tab.inner_text(".head")
    tab.locator(".head .words bdi").first.wait_for()
    tab.click(".tops .context >> nth=0")
    tab.wait_for_selector(".details .words")
    told = tab.inner_text(".details")
    assert "What the changes of components promote" in told
    assert tab.locator(".details button.link", has_text="L2H1").count() >= 1
    assert tab.evaluate("typeof hacked") == "undefined"


def test_heads_by_click_key_and_hover(opened, ds):
    tab, heads = opened(ds), sr.by_head(ds, 0.1)
    layer, head = np.unravel_index(heads.top_self_repair.values.argmax(), (3, 2))
    assert chosen(tab).startswith(label(heads, layer, head))
    tab.click(".cell[aria-label^=L1H0]")
    assert chosen(tab).startswith(label(heads, 1, 0))
    tab.keyboard.press("ArrowRight")
    tab.wait_for_selector(".cell[aria-label^=L1H1][aria-selected=true]")
    tab.keyboard.press("ArrowDown")
    tab.wait_for_selector(".cell[aria-label^=L2H1][aria-selected=true]:focus")
    assert settled(tab).inner_text(".head h3").startswith("L2H1")
    tab.hover(".cell[aria-label^=L0H1]")
    hint = tab.inner_text(".explorer-hint")
    assert hint.startswith("L0H1")
    value, reach = (float(heads[n][0, 1]) for n in ("top_self_repair", "top_self_repair_half_width"))
    assert f"{abs(value):.3f} ± {reach:.3f}" in hint
    tab.select_option(".heads select", label="direct effect")
    shown = settled(tab).get_attribute(".cell[aria-label^=L0H1]", "aria-label")
    assert f"{abs(float(heads.top_direct_effect[0, 1])):.3f}" in shown
    assert tab.evaluate("location.hash").startswith("#L2H1")


def test_choices_that_come_faster_than_they_are_drawn(opened):
    """Each is marked in the grid at once; what is drawn in the end belongs to the last of each kind."""
    tab = opened(simulate_heads(3, 2, 60, 11, seed=4, components=True))
    own = chosen(tab).split()[0]
    between = """async () => {
      document.querySelector(".token[data-token='7']").click();
      for (let turn = 0; turn < 20; turn++) await null;
      const select = document.querySelector(".heads select");
      select.value = 2;
      select.dispatchEvent(new Event("change"));
    }"""
    tab.evaluate(between)
    assert f"prompt 0, position 7, ablated: {own}" in settled(tab).inner_text(".details")
    quick = """([own, other]) => {
      const marked = () => document.querySelector(".cell[aria-selected=true]").ariaLabel.split(" ")[0];
      const cell = (name) => document.querySelector(`.cell[aria-label^=${name}]`);
      const select = document.querySelector(".heads select");
      const told = [other, own, other].map((name) => (cell(name).click(), marked()));
      document.querySelector(".token[data-token='5']").click();
      select.value = 1;
      select.dispatchEvent(new Event("change"));
      return told;
    }"""
    assert tab.evaluate(quick, [own, "L0H0"]) == ["L0H0", own, "L0H0"]
    assert chosen(tab).startswith("L0H0")
    assert tab.inner_text(".head h3").startswith("L0H0")
    assert "prompt 0, position 5, ablated: L0H0" in tab.inner_text(".details")
    assert tab.evaluate("document.querySelector('.heads select').value") == "1"
    address = tab.evaluate("location.hash")
    assert address.startswith("#L0H0")
    assert address.endswith("~5")


def test_top_tokens_lead_to_the_text_and_all_numbers(opened, ds):
    tab = opened(ds)
    tab.click(".cell[aria-label^=L1H0]")
    effects = ds.direct_effect.values[1, 0].ravel()
    best = int(effects.argmax())
    assert settled(tab).get_attribute(".tops tbody tr >> nth=0", "data-token") == str(best)
    tab.click(".tops .context >> nth=0")
    tab.wait_for_selector(f".token[data-token='{best}'][aria-selected=true]")
    prompt, position = divmod(best, 11)
    details = settled(tab).inner_text(".details")
    assert f"prompt {prompt}, position {position}, ablated: L1H0" in details
    rows = dict(
        tab.locator(".details table tr").evaluate_all(
            "rows => rows.map(r => [r.cells[0].textContent, r.cells[1].textContent])"
        )
    )
    for name in ("direct_effect", "self_repair", "logit", "norm_scale"):
        true = float(
            ds[name].values[1, 0].ravel()[best] if ds[name].ndim > 2 else ds[name].values.ravel()[best]
        )
        assert float(rows[ds[name].attrs["long_name"]].replace("−", "-")) == pytest.approx(true, abs=0.02)
    tab.select_option(".text select", "self_repair")
    tab.wait_for_selector("h3:has-text('Text, by self-repair of L1H0')")
    tab.focus(".prompts")
    tab.keyboard.press("ArrowLeft")
    tab.wait_for_selector(f".token[data-token='{best - 1}'][aria-selected=true]")
    settled(tab).hover(f".token[data-token='{best}']")
    assert "self-repair" in tab.inner_text(".explorer-hint")
    tab.select_option(".tops select", "-self_repair")
    top, repair = sr.top_share(ds, 0.1).values[1, 0].ravel(), ds.self_repair.values[1, 0].ravel()
    least = int(np.where(top, repair, np.inf).argmin())
    tab.wait_for_selector(f".tops tbody tr:first-child[data-token='{least}']")


@pytest.mark.parametrize(("tail", "ranked"), [("bottom", lambda v: -v), ("absolute", np.abs)])
def test_tokens_of_another_tail_are_in_its_order(opened, ds, tail, ranked):
    tab, effects = opened(sr.choose_tokens(ds, tail=tail), at="#L1H0"), ds.direct_effect.values[1, 0].ravel()
    tab.wait_for_selector(".head h3:has-text('L1H0')")
    rows = tab.locator(".tops tbody tr").evaluate_all("rows => rows.map(r => Number(r.dataset.token))")
    assert rows == np.argsort(-ranked(effects), kind="stable")[: len(rows)].tolist()
    name = {"bottom": "lowest", "absolute": "largest"}[tail]
    assert tab.inner_text(".tops select option >> nth=0") == f"{name} direct effect"


@pytest.mark.parametrize("size", representative([WIDE, NARROW], NARROW))
def test_the_chosen_one_of_many_heads_is_seen(opened, size):
    tab = opened(simulate_heads(2, 40, 30, 11, seed=4), size, at="#L1H39")
    cell, card = (tab.locator(where).bounding_box() for where in (".cell[aria-selected=true]", ".heads"))
    assert card["x"] <= cell["x"] < cell["x"] + cell["width"] <= card["x"] + card["width"]
    assert tab.evaluate("scrollY") == 0
    assert card["width"] > 0.9 * size["width"]


def test_colours_say_the_sign(opened, ds):
    tab = opened(ds)
    tab.click(".cell[aria-label^=L1H0]")
    settled(tab)
    effects = ds.direct_effect.values[1, 0].ravel()
    for token in (int(effects[:60].argmax()), int(effects[:60].argmin())):
        classes = tab.get_attribute(f".token[data-token='{token}']", "class").split()
        assert ("below" in classes) == (effects[token] < 0)
        colour = tab.evaluate(
            f"getComputedStyle(document.querySelector(\".token[data-token='{token}']\")).backgroundColor"
        )
        assert colour not in ("rgba(0, 0, 0, 0)", "rgb(255, 255, 255)")


def test_links_lead_to_who_repairs(opened, ds):
    tab = opened(ds)
    tab.click(".cell[aria-label^=L0H0]")
    settled(tab)
    pairs = sr.who_repairs(ds, 0.1)
    first = tab.locator(".head .bars .link").first
    name = first.inner_text()
    component = pairs.component.values.tolist().index(name)
    row = tab.locator(".head .bars li:has(.link)").first.inner_text()
    assert f"{abs(float(pairs.repair[0, 0, component])):.3f}" in row
    first.click()
    tab.wait_for_selector(f".head h3:has-text('{name}')")
    assert chosen(tab).startswith(name)
    settled(tab)
    tab.go_back()
    tab.wait_for_selector(".head h3:has-text('L0H0')")
    tab.go_forward()
    tab.wait_for_selector(f".head h3:has-text('{name}')")


def test_a_place_that_is_no_whole_number_is_one_before_it(opened, ds):
    tab = opened(ds)
    tab.fill(".pager input", "1.5")
    tab.press(".pager input", "Enter")
    settled(tab)
    assert tab.inner_text(".prompt >> nth=0").startswith("1 ")


def test_of_a_token_that_is_not_done_there_is_no_empty_table(opened, ds):
    half = unfinished(ds, done=np.arange(60) < 30)
    tab = opened(half, at=f"#L0H0~~self_repair~{59 * ds.sizes['position']}")
    tab.wait_for_selector(".details h3:has-text('→')")
    settled(tab)
    assert tab.locator(".details table").count() == 0


def test_variants_have_a_selector_and_sums_stand_for_components(opened, variants):
    tab = opened(variants)
    before = tab.inner_text(".head .facts div >> nth=0").split()[0]
    assert tab.locator(".head .bars li").count() == 3
    tab.select_option(".axes select", label="second")
    tab.locator(".head .facts b").first.filter(has_not_text=before).wait_for()
    after = tab.inner_text(".head .facts div >> nth=0").split()[0]
    assert float(after) == pytest.approx(2 * float(before), abs=0.002)


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "light"), (NARROW, "dark")])
def test_partners_have_a_selector(opened, variants, size, scheme):
    """First the mean over them: 1.5 times the first one's self-repair, the second one's is twice that."""
    tab = opened(variants.drop_vars("way").rename(way="resample"), size, scheme)
    assert tab.locator(".axes label").inner_text().startswith("resample")
    shown = tab.locator(".head .facts b").first
    told, before = {}, "nothing"
    for label in ("partner 0", "partner 1", "mean over 2 partners"):
        tab.select_option(".axes select", label=label)
        shown.filter(has_not_text=before).wait_for()
        told[label] = before = shown.inner_text().split()[0]
    first, second, mean = map(float, told.values())
    assert second == pytest.approx(2 * first, abs=0.002)
    assert mean == pytest.approx(1.5 * first, abs=0.002)
    assert tab.evaluate("document.documentElement.scrollWidth") <= size["width"]


def test_two_stores_side_by_side_follow_each_other(opened, ds):
    tab = opened({"mine": ds, "theirs": simulate_heads(3, 2, 60, 11, seed=5)})
    assert tab.locator(".pane h2").all_inner_texts() == ["mine", "theirs"]
    tab.locator(".pane").nth(0).locator(".cell[aria-label^=L0H1]").click()
    tab.locator(".pane").nth(1).locator(".cell[aria-label^=L0H1][aria-selected=true]").wait_for()
    tab.uncheck(".together input")
    tab.locator(".pane").nth(1).locator(".cell[aria-label^=L2H0]").click()
    tab.locator(".pane").nth(1).locator(".cell[aria-label^=L2H0][aria-selected=true]").wait_for()
    assert chosen(tab, 0).startswith("L0H1")
    boxes = [tab.locator(".pane").nth(i).bounding_box() for i in (0, 1)]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]


def test_what_is_chosen_is_in_the_address(opened, ds):
    tab = opened(ds, at="#L0H1~~self_repair~30&<script>")
    assert chosen(tab).startswith("L0H1")
    assert "prompt 2, position 8" in tab.inner_text(".details")
    assert "by self-repair of L0H1" in tab.inner_text(".text h3")
    assert chosen(opened(ds, at="#nonsense~9.9~x~-4&%E0%A4%A")) is not None


def test_hostile_text_is_text(opened, ds):
    tab = opened(ds)
    assert tab.locator(".token[data-token='0']").inner_text() == EVIL.replace("\u202e", "\\u202e").replace(
        "\x1b", "\\x1b"
    )
    tab.click(".token[data-token='0']")
    settled(tab).hover(".token[data-token='0']")
    assert "<img src=x" in tab.inner_text(".explorer-hint")
    assert "<img src=x" in tab.inner_text(".details h3")
    assert tab.evaluate("[typeof hacked, document.images.length]") == ["undefined", 0]


@pytest.mark.parametrize("scheme", representative(["light", "dark"], "dark"))
def test_narrow_light_and_dark(opened, ds, scheme):
    tab = opened(ds, NARROW, scheme)
    tab.click(".tops .context >> nth=0")
    tab.wait_for_selector(".details:not(.empty) .close")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    token = settled(tab).locator(".token[aria-selected=true]").bounding_box()
    assert 0 <= token["y"] < tab.locator(".details").bounding_box()["y"]
    ink, paper = tab.evaluate(
        "['color', 'backgroundColor'].map(p => getComputedStyle(document.querySelector('.card'))[p])"
    )
    bright = [sum(map(int, c.strip("rgb()").split(",")[:3])) for c in (ink, paper)]
    assert (bright[0] > 500 > bright[1]) == (scheme == "dark")
    tab.click(".details .close")
    tab.wait_for_selector(".details.empty")


def test_it_is_first_on_a_report(opened, ds, monkeypatch):
    monkeypatch.setattr("selfrepair_nn.report.figures.drawn", lambda *_, **__: ())
    tab = opened(ds, write=sr.write_report)
    tab.click(".cell[aria-label^=L0H1]")
    tab.wait_for_selector(".head h3:has-text('L0H1')")
    assert tab.locator("h1").bounding_box()["y"] < tab.locator("#explorer").bounding_box()["y"] < 250
    assert tab.locator("#explorer h2").first.is_hidden()
    several = opened({"mine": ds, "theirs": ds, "third": ds}, write=sr.write_report)
    seen = several.locator("#explorer h2")
    assert [each.is_visible() for each in seen.all()] == [True, True, False]
    several.get_by_label("third", exact=True).first.check()
    several.get_by_label("mine", exact=True).first.uncheck()
    assert [each.is_visible() for each in seen.all()] == [False, True, True]
    several.locator(".pane:visible .cell[aria-label^=L0H1]").first.click()
    several.wait_for_selector(".pane:last-child .head h3:has-text('L0H1')")


def test_a_notebook_shows_it_within_itself(opened, ds, tmp_path, monkeypatch):
    shown, shell = [], SimpleNamespace(config={"IPKernelApp": {}})
    module = SimpleNamespace(display=shown.append, get_ipython=lambda: shell, HTML=str)
    for name in ("IPython", "IPython.display"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)
    assert sr.view(ds, "given.html", share=0.1).exists()
    assert not shown

    def cell(stores, path, share):
        sr.view(stores, share=share)
        path.write_text(f"<!DOCTYPE html><html data-ready>{shown.pop()}")
        return path

    tab = opened(ds, write=cell)
    within = tab.frame_locator("iframe")
    within.locator(".cell[aria-label^=L0H1]").click()
    within.locator(".head h3:has-text('L0H1')").wait_for()
    within.locator(".token[data-token='0']").click()
    within.locator(".details h3", has_text="<img src=x").wait_for()
    assert tab.evaluate("[typeof hacked, document.images.length]") == ["undefined", 0]


def test_it_prints(opened, ds):
    """On paper, whatever the screen is."""
    tab = opened(ds, scheme="dark")
    assert tab.pdf()[:4] == b"%PDF"
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor") == "rgb(255, 255, 255)"


def test_cases_are_tiles(opened, ds):
    cases = ds.isel(layer=0).drop_vars(["layer", "component_change"]).rename(head="case")
    cases = cases.assign_coords(case=["L0H0+L1H1", "L2.mlp"], case_layer=("case", [0, 2]))
    cases = cases.assign(noise_floor=("case", [1e-6, 1e-6]))
    tab = opened(cases)
    assert [text.rstrip("•×") for text in tab.locator(".cell").all_inner_texts()] == ["L0H0+L1H1", "L2.mlp"]
    tab.click(".cell >> nth=0")
    tab.keyboard.press("ArrowDown")
    tab.wait_for_selector(".head h3:has-text('L2.mlp')")
