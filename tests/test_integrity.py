"""A store is whole or says what it lost: damage is found, named, never averaged over, and mended."""

import json
import shutil

import numpy as np
import pytest
import xarray as xr
import zarr
from damaged import attribute, chunks, copied, cut, emptied, flipped, old_format, removed, swapped
from made import SWEPT
from terminal import assert_same_numbers, done, files, ids, saved, selfrepair
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn.errors import Incomplete, StoreError
from selfrepair_nn.integrity import verify
from selfrepair_nn.quantities import COORDINATES, QUANTITIES
from selfrepair_nn.store import Store

PROMPTS, BLOCK = 24, 6
RUNS = {
    "heads": {},
    "components": {"components": "top", "share": 0.1},
    "top-share": {"select": "top-share", "share": 0.1},
    "until-ci": {"until_ci": 0.5, "share": 0.2},
    "until-ci, all": {"until_ci": 0.5, "share": 0.2, "select": "all"},
    "mean": {"ablation": "mean"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def asked(model, tmp_path_factory):
    prompts = ids(tmp_path_factory.mktemp("prompts") / "p.npy", PROMPTS)
    return {"model": str(model), "prompts": str(prompts), "layers": "1", "batch_size": BLOCK}


@pytest.fixture(scope="module")
def ran(asked, tmp_path_factory):
    """ran(kind): the finished store of a run of `RUNS`, made once; nobody may change it."""
    made = {}

    def finished(kind="heads"):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("ran") / "s.zarr"
            sr.run(out=made[kind], **asked | RUNS[kind])
        return made[kind]

    return finished


@pytest.fixture
def store(ran, tmp_path):
    """A finished store that may be harmed."""
    return copied(ran(), tmp_path / "s.zarr")


@pytest.fixture
def command(asked):
    """The arguments of the run, without its --out."""
    named = {f"--{name.replace('_', '-')}": value for name, value in asked.items()}
    return ["run", "heads", *(each for pair in named.items() for each in pair)]


def stopped(path, monkeypatch, after, **choices):
    """A run that was interrupted when so many blocks were marked."""
    write, left = Store.write_prompts, [after]

    def writing(self, block, values, done=None):
        if done is not None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        write(self, block, values, done)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write_prompts", writing)
        with pytest.raises(Incomplete):
            sr.run(out=path, **choices)
    return path


def part_done(out, choices):
    """Whether a summary says that half of the run is done, or none of its intervals known."""
    said = "0 of 5 within" if "until_ci" in choices else "50% of the run done"
    return said in " ".join(out.split())


# What is written


@pytest.mark.parametrize("kind", RUNS)
def test_every_chunk_of_what_is_done_is_there_and_checksummed(ran, kind):
    """Blank ones too: a top share leaves most of them blank."""
    path = ran(kind)
    group = zarr.open_group(path, mode="r")
    for name, array in group.arrays():
        assert array.metadata.codecs[-1].to_dict() == {"name": "crc32c"}, name
        marked = group["done"][:].any(tuple(range(group["done"].ndim - 1)))
        along = (
            QUANTITIES[name].dims.index("prompt")
            if name not in COORDINATES and "prompt" in QUANTITIES[name].dims
            else None
        )
        wanted = int(np.prod([-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)]))
        if along is not None and name not in ("done", "direct_effect"):
            wanted = wanted * int(marked[::BLOCK].sum()) // len(marked[::BLOCK])
        found = chunks(path, name)
        assert len(found) >= wanted > 0, name
        assert all((path / file).stat().st_size > 4 for file in found)


@pytest.mark.parametrize("kind", RUNS)
def test_bare_xarray_reads_the_same(ran, kind):
    bare, ours = xr.open_zarr(ran(kind)).load(), sr.open_store(ran(kind)).load()
    xr.testing.assert_identical(bare, ours)
    assert verify(ran(kind)) == []


def test_bare_xarray_meets_damage_where_it_reads_it(store):
    flipped(store / "self_repair/c/0/0/1/0")
    with pytest.raises(ValueError, match="checksum"):
        xr.open_zarr(store).self_repair.load()


# Every file there is


def harmable(store):
    return sorted(str(p.relative_to(store)) for p in store.rglob("*") if p.is_file())


@pytest.mark.parametrize("kind", representative(["heads", "components", "until-ci"], "until-ci"))
@pytest.mark.parametrize(
    "harm", representative([flipped, cut, emptied, removed], flipped, removed), ids=lambda f: f.__name__
)
def test_damage_to_any_file_is_found_and_named(ran, tmp_path, kind, harm):
    """Each file in turn: chunks, labels, marks, metadata and the checksums themselves."""
    store = copied(ran(kind), tmp_path / "s.zarr")
    for file in harmable(store):
        whole = (store / file).read_bytes()
        harm(store / file)
        assert [each.file for each in verify(store)] == [file]
        (store / file).parent.mkdir(exist_ok=True)
        (store / file).write_bytes(whole)
    assert verify(store) == []


@pytest.mark.parametrize("file", ["zarr.json", "done/zarr.json", "checksums/0.json", "checksums/attributes.json"])
def test_json_that_is_nested_without_end_is_damage(store, file):
    assert (store / file).exists()
    (store / file).write_text("[" * 200_000)
    assert file in {each.file for each in verify(store)}
    with pytest.raises(StoreError, match="is not whole"):
        sr.open_store(store)


@pytest.mark.parametrize("harm", representative([cut, emptied, removed], cut, removed), ids=lambda f: f.__name__)
def test_opening_counts_the_files(ran, tmp_path, harm):
    """Without reading a chunk of what is large."""
    store = copied(ran(), tmp_path / "s.zarr")
    for file in harmable(store):
        whole = (store / file).read_bytes()
        harm(store / file)
        with pytest.raises(StoreError) as caught:
            sr.open_store(store)
        assert file in str(caught.value)
        assert "\n" not in str(caught.value)
        (store / file).parent.mkdir(exist_ok=True)
        (store / file).write_bytes(whole)
    sr.open_store(store)


# Every way


def swap(one, other):
    return lambda store: swapped(store / one, store / other)


def harm(how, file):
    return lambda store: how(store / file)


def of_another_store(store):
    """The same chunk of a run on other prompts: its own checksum is right."""
    other = json.loads((store / "zarr.json").read_text())["attributes"]
    choices = json.loads(other["settings"])
    prompts = ids(store.parent / "q.npy", PROMPTS, seed=5)
    model = choices["model"]
    sr.run(model=model, prompts=str(prompts), layers="1", batch_size=BLOCK, out=store.parent / "other.zarr")
    shutil.copy(store.parent / "other.zarr/logit_change/c/0/0/2/0", store / "logit_change/c/0/0/2/0")


DAMAGES = {
    "a lost chunk": (harm(removed, "direct_effect/c/0/0/3/0"), {"direct_effect/c/0/0/3/0"}),
    "a flipped bit": (harm(flipped, "from_norm/c/0/0/0/0"), {"from_norm/c/0/0/0/0"}),
    "a truncated chunk": (harm(cut, "logit/c/1/0"), {"logit/c/1/0"}),
    "an empty chunk": (harm(emptied, "closure/c/0/0/1/0"), {"closure/c/0/0/1/0"}),
    "an empty mark": (harm(emptied, "done/c/0/0/2"), {"done/c/0/0/2"}),
    "a lost mark": (harm(removed, "done/c/0/0/0"), {"done/c/0/0/0"}),
    "all marks lost": (harm(removed, "done/c"), {f"done/c/0/0/{i}" for i in range(4)}),
    "swapped blocks": (
        swap("self_repair/c/0/0/0/0", "self_repair/c/0/0/1/0"),
        {"self_repair/c/0/0/0/0", "self_repair/c/0/0/1/0"},
    ),
    "swapped arrays": (
        swap("from_heads/c/0/0/0/0", "from_mlps/c/0/0/0/0"),
        {"from_heads/c/0/0/0/0", "from_mlps/c/0/0/0/0"},
    ),
    "swapped labels": (swap("token/c/0/0", "target/c/0/0"), {"token/c/0/0", "target/c/0/0"}),
    "another run's chunk": (of_another_store, {"logit_change/c/0/0/2/0"}),
    "lost tokens": (harm(removed, "token/c/0/0"), {"token/c/0/0"}),
    "flipped partners": (harm(flipped, "partner/c/0"), {"partner/c/0"}),
    "lost selection": (harm(removed, "selected/c/0/0"), {"selected/c/0/0"}),
    "empty noise floor": (harm(emptied, "noise_floor/c/0"), {"noise_floor/c/0"}),
    "a flipped layer": (harm(flipped, "layer/c/0"), {"layer/c/0"}),
    "a deleted array": (
        harm(removed, "norm_scale"),
        {"norm_scale/zarr.json", *(f"norm_scale/c/{i}/0" for i in range(4))},
    ),
    "deleted marks": (harm(removed, "done"), {"done/zarr.json", *(f"done/c/0/0/{i}" for i in range(4))}),
    "a deleted label": (harm(removed, "document"), {"document/zarr.json", "document/c/0"}),
    "cut metadata of an array": (harm(cut, "closure/zarr.json"), {"closure/zarr.json"}),
    "cut metadata": (lambda store: cut(store / "zarr.json", 700), {"zarr.json"}),
    "no metadata": (harm(removed, "zarr.json"), {"zarr.json"}),
    "settings of a wrong type": (lambda store: attribute(store, "settings", 5), {"zarr.json"}),
    "a chunk length of a wrong type": (lambda store: attribute(store, "prompts_per_chunk", "x"), {"zarr.json"}),
    "a format of a wrong type": (lambda store: attribute(store, "format", "two"), {"zarr.json"}),
    "a layer count of a wrong type": (lambda store: attribute(store, "n_layers", [3]), {"zarr.json"}),
    "lost checksums": (harm(removed, "checksums/2.json"), {"checksums/2.json"}),
    "cut checksums of the labels": (harm(cut, "checksums/fixed.json"), {"checksums/fixed.json"}),
    "no checksums at all": (
        harm(removed, "checksums"),
        {f"checksums/{name}.json" for name in ("zarr", "attributes", "fixed", *range(4))},
    ),
}  # fmt: skip


TELLING = (
    "a lost chunk",
    "a flipped bit",
    "an empty mark",
    "all marks lost",
    "swapped blocks",
    "another run's chunk",
    "lost selection",
    "a deleted array",
    "cut metadata",
    "settings of a wrong type",
    "cut checksums of the labels",
    "no checksums at all",
)
"""One of each kind: what is computed, marked, chosen or said of it; lost, changed or in the wrong place."""


@pytest.mark.parametrize("name", representative(DAMAGES, *TELLING))
def test_damage_is_listed_refused_and_mended(ran, command, tmp_path, name):
    """`verify` lists all of it, nothing is said of the rest, and the same command computes it again, bit for bit."""
    store = copied(ran(), tmp_path / "s.zarr")
    spoil, expected = DAMAGES[name]
    spoil(store)
    told = selfrepair("verify", store)
    assert told.code == 1
    assert {line.split(" is ")[0] for line in told.out.splitlines()} == expected
    assert "selfrepair run heads" in told.err or "selfrepair_nn.run" in told.err
    assert {each.file for each in sr.verify(store)} == expected
    if name != "a flipped bit":  # what is read is told then: below
        for shown in (selfrepair("info", store), selfrepair("report", store), selfrepair("plot", store)):
            assert shown.code == 1
            assert shown.out == ""
            assert len(shown.err.splitlines()) == 1
            assert any(file in shown.err for file in expected)
    ended = selfrepair(*command, "--out", store)
    assert ended.code == 0, ended.err
    assert any(file in ended.err for file in expected), "it says what it computes again"
    assert_same_numbers(store, ran())
    whole = selfrepair("verify", store)
    assert (whole.code, whole.err) == (0, "")
    assert sr.open_store(store).attrs["finished"]


def test_a_flipped_bit_is_told_when_it_is_read(store):
    flipped(store / "from_norm/c/0/0/0/0")
    for shown in (selfrepair("info", store), selfrepair("report", store), selfrepair("plot", store)):
        assert shown.code == 1
        assert len(shown.err.splitlines()) == 1
        assert "from_norm/c/0/0/0/0 is damaged" in shown.err
    with pytest.raises(StoreError, match="from_norm/c/0/0/0/0"):
        sr.open_store(store).load()


@pytest.mark.parametrize("kind", representative([kind for kind in RUNS if kind != "heads"], "until-ci", "mean"))
def test_what_any_run_lost_is_computed_again(ran, asked, tmp_path, kind):
    """A chunk of everything in turn that such a run has beside the others, and of what it found out beforehand."""
    store = copied(ran(kind), tmp_path / "s.zarr")
    found = {n for n in zarr.open_group(store).array_keys() if n not in COORDINATES}
    special = found - {*SWEPT, "logit", "mean_logit", "target_constant", "norm_scale"} | {
        "direct_effect",
        "self_repair",
    }
    for name in sorted(special):
        removed(store / chunks(store, name)[-1])
        with pytest.raises(StoreError, match=name):
            sr.open_store(store)
        sr.run(out=store, **asked | RUNS[kind])
        assert_same_numbers(store, ran(kind))
        assert verify(store) == []


def test_much_damage_at_once_is_mended_by_one_command(store, ran, command):
    for name in ("self_repair", "norm_scale", "done"):
        flipped(store / chunks(store, name)[0])
    for name in ("token_text", "noise_floor", "prompt"):
        removed(store / chunks(store, name)[0])
    cut(store / "zarr.json", 100)
    assert len(sr.verify(store)) == 7
    assert selfrepair(*command, "--out", store).code == 0
    assert_same_numbers(store, ran())


def test_only_what_is_damaged_is_computed_again(store, command):
    before = files(store)
    removed(store / "self_repair/c/0/0/1/0")
    assert selfrepair(*command, "--out", store).code == 0
    after = files(store)
    changed = {tuple(name.split("/")) for name in before if after[name] != before[name] and "/c/" in name}
    at = {name: QUANTITIES[name].dims.index("prompt") for name, *_ in changed if name != "threshold"}
    assert {each[2 + at[each[0]]] for each in changed if each[0] in at} == {"1"}


def test_a_mending_that_is_interrupted_goes_on(store, ran, asked, monkeypatch):
    """What is damaged does not count as done from the first moment on."""
    for block in range(3):
        removed(store / f"self_repair/c/0/0/{block}/0")
    write, left = Store.write_prompts, [4]  # three marks are taken back, one block is computed

    def writing(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write_prompts", writing)
        with pytest.raises(Incomplete):
            sr.run(out=store, **asked)
    assert done(store) == 2 * BLOCK * 5
    assert part_done(selfrepair("info", store).out, {})
    assert verify(store) == []
    sr.run(out=store, **asked)
    assert_same_numbers(store, ran())


# Not done is not lost


@pytest.mark.parametrize("kind", representative(RUNS, "heads", "until-ci"))
def test_an_unfinished_run_is_whole_as_far_as_it_goes(asked, ran, tmp_path, monkeypatch, kind):
    path = stopped(tmp_path / "s.zarr", monkeypatch, 2, **asked | RUNS[kind])
    told = selfrepair("verify", path)
    assert told.code == 75
    assert "has not finished" in told.err
    assert "selfrepair_nn.run" in told.err
    assert verify(path) == []
    shown = selfrepair("info", path)
    assert shown.code == 0
    assert part_done(shown.out, RUNS[kind])
    assert sr.by_head(xr.open_zarr(path)).tokens.sum() > 0
    removed(path / "self_repair/c/0/0/0/0")
    assert selfrepair("info", path).code == 1
    sr.run(out=path, **asked | RUNS[kind])
    assert_same_numbers(path, ran(kind))


def test_a_store_that_nothing_was_computed_for_is_whole(asked, tmp_path, monkeypatch):
    path = stopped(tmp_path / "s.zarr", monkeypatch, 0, **asked)
    assert verify(path) == []
    assert "nothing is done yet" in selfrepair("info", path).out


# Python


FUNCTIONS = {
    "by_head": sr.by_head,
    "by_layer": sr.by_layer,
    "top_share": sr.top_share,
    "most_repaired": sr.most_repaired,
    "norm_by_head": sr.norm_by_head,
    "scale_by_head": sr.scale_by_head,
    "token_noise": sr.token_noise,
    "summary": sr.summary,
    "plot": lambda ds: sr.plot(ds, "never", ("self_repair_by_layer",)),
    "write_report": lambda ds: sr.write_report(ds, "never.html"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("how", representative([flipped, removed, emptied], removed), ids=lambda f: f.__name__)
def test_what_bare_xarray_opened_is_not_averaged_over_a_hole(store, function, how, tmp_path, monkeypatch):
    """Whole, cut to a part that is not harmed, or already in memory: the store it comes from is looked at."""
    monkeypatch.chdir(tmp_path)
    loaded = xr.open_zarr(store).load()
    how(store / "logit_change/c/0/0/3/0")
    for ds in (xr.open_zarr(store), loaded, xr.open_zarr(store).sel(head=[0, 1])):
        with pytest.raises(StoreError, match="logit_change/c/0/0/3/0"):
            FUNCTIONS[function](ds)


@pytest.mark.parametrize("function", FUNCTIONS.keys() - {"top_share"})
def test_a_blank_in_what_is_done_is_refused(ran, function, tmp_path, monkeypatch):
    """Of a dataset whose store is not known any more."""
    monkeypatch.chdir(tmp_path)
    ds = xr.open_zarr(ran()).load()
    ds.encoding = {}
    FUNCTIONS["by_head"](ds)
    for name in ("direct_effect", "logit_change", "noise_floor"):
        harmed = ds.copy(deep=True)
        harmed[name][{d: 0 for d in harmed[name].dims if d != "position"}] = np.nan
        with pytest.raises(StoreError, match=f"{name}.* is blank though it is marked done"):
            FUNCTIONS[function](harmed)


def test_blanks_beside_the_top_share_are_no_holes_but_blanks_on_it_are(ran):
    ds = xr.open_zarr(ran("top-share")).load()
    ds.encoding = {}
    share = json.loads(ds.attrs["settings"])["share"]
    sr.by_head(ds, share)
    ds["self_repair"][...] = ds.self_repair.where(ds.prompt >= BLOCK)
    with pytest.raises(StoreError, match="self_repair is blank"):
        sr.by_head(ds, share)


def test_another_store_at_the_path_is_not_asked(store, ran):
    ds = xr.open_zarr(store).load()
    expected = sr.by_head(ds)
    shutil.rmtree(store)
    xr.testing.assert_identical(sr.by_head(ds), expected)
    copied(ran("components"), store)
    removed(store / "self_repair/c/0/0/0/0")
    xr.testing.assert_identical(sr.by_head(ds), expected)


def test_verify_says_what_is_no_store(tmp_path):
    with pytest.raises(StoreError, match="there is no store"):
        sr.verify(tmp_path / "s.zarr")
    (tmp_path / "s.zarr").mkdir()
    ended = selfrepair("verify", tmp_path / "s.zarr")
    assert ended.code == 1
    assert "not a store of selfrepair_nn" in ended.err


# The format before checksums


@pytest.mark.parametrize("kind", ["heads", "top-share"])
def test_a_store_of_the_old_format_opens_and_summarises(ran, tmp_path, kind):
    old = old_format(ran(kind), tmp_path / "s.zarr")
    assert verify(old) == []
    assert (
        selfrepair("info", old).out.split("variables")[1]
        == selfrepair("info", ran(kind)).out.split("variables")[1]
    )
    xr.testing.assert_identical(
        sr.open_store(old).load().drop_attrs(), sr.open_store(ran(kind)).load().drop_attrs()
    )
    assert selfrepair("verify", old).code == 0


@pytest.mark.parametrize("kind", representative([kind for kind in RUNS if kind != "components"], "until-ci"))
def test_a_store_of_the_old_format_resumes(asked, ran, tmp_path, monkeypatch, kind):
    new = stopped(tmp_path / "new.zarr", monkeypatch, 2, **asked | RUNS[kind])
    old = old_format(new, tmp_path / "old.zarr")
    assert selfrepair("verify", old).code == 75
    assert part_done(selfrepair("info", old).out, RUNS[kind])
    sr.run(out=old, **asked | RUNS[kind])
    assert_same_numbers(old, ran(kind))
    assert sr.open_store(old).attrs["format"] == 1


OLD = {
    "a lost chunk": harm(removed, "self_repair/c/0/0/1/0"),
    "a cut chunk": harm(cut, "self_repair/c/0/0/1/0"),
    "an empty chunk": harm(emptied, "self_repair/c/0/0/1/0"),
    "an empty mark": harm(emptied, "done/c/0/0/1"),
    "a lost mark": harm(removed, "done/c/0/0/1"),
    "cut metadata of an array": harm(cut, "self_repair/zarr.json"),
}


@pytest.mark.parametrize("name", representative(OLD, "a lost chunk", "a lost mark", "cut metadata of an array"))
def test_damage_of_the_old_format_is_found_and_mended_as_far_as_it_can_be_told(ran, asked, tmp_path, name):
    old = old_format(ran(), tmp_path / "s.zarr")
    OLD[name](old)
    assert len(verify(old)) == 1
    with pytest.raises(StoreError):
        sr.by_head(xr.open_zarr(old))
    sr.run(out=old, **asked)
    assert_same_numbers(old, ran())
    assert verify(old) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("settings", 5), ("settings", "{"), ("prompts_per_chunk", "x"), ("kept_share", "all"), ("n_heads", [5])],
)
def test_attributes_of_the_old_format_that_are_of_a_wrong_type_are_named(ran, command, tmp_path, name, value):
    """Nothing else holds them: the remedy is another one."""
    old = old_format(ran(), tmp_path / "s.zarr")
    attribute(old, name, value)
    assert [str(each) for each in verify(old)] == [f"zarr.json is wrong about {name}"]
    for ended in (selfrepair("info", old), selfrepair("report", old), selfrepair(*command, "--out", old)):
        assert ended.code == 1
        assert len(ended.err.splitlines()) == 1
        assert f"wrong about {name}" in ended.err
    assert "remove the store" in ended.err
