"""What a store promises: bare xarray reads it, it describes itself, whole chunks or nothing, and no secrets."""

import errno
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from made import CLEAN, COMPONENT, SWEPT
from terminal import files, ids, saved, selfrepair
from zarr.storage import _local

import selfrepair_nn as sr
from selfrepair_nn import store as store_room
from selfrepair_nn.errors import StoreError
from selfrepair_nn.quantities import COORDINATES, QUANTITIES
from selfrepair_nn.store import Store, open_store

SIZES = {"layer": 2, "head": 3, "prompt": 7, "position": 4, "component": 5}
SIZES |= {"case": 2, "distance": 2, "rank": 3, "neuron": 6, "choice": 4, "resample": 2}
SIZES |= {"word": 2, "changed": 3, "vocabulary": 5}
PER_CHUNK = 3
DATA = tuple(name for name in QUANTITIES if name not in COORDINATES)
BY_PROMPT = tuple(name for name in DATA if "prompt" in QUANTITIES[name].dims and name != "done")
TEXTS = [
    "",
    " the",
    "日本語",
    "é\u0301",
    "\ufffd",
    "🙂\n\t",
    "שלום",
    " ",
    "a\x00b",
    "x" * 3000,
    "'\"\\",
    "NaN",
]


def shape(name):
    return tuple(SIZES[d] for d in QUANTITIES[name].dims)


def coordinates():
    """Labels of every coordinate: numbers, and texts that are awkward and longer than any before."""
    found = {}
    for name in COORDINATES:
        size = int(np.prod(shape(name)))
        values = (
            [TEXTS[i % len(TEXTS)] for i in range(size)] if QUANTITIES[name].kind == "string" else range(size)
        )
        kind = {"string": object, "bool": bool}.get(QUANTITIES[name].kind)
        found[name] = np.array(values, dtype=kind).reshape(shape(name))
    return found


def create(path, precision="float32", **more):
    """An empty store that holds everything a store can hold."""
    arguments = {"coordinates": coordinates(), "data": dict.fromkeys(DATA), "prompts_per_chunk": PER_CHUNK}
    arguments |= {"precision": precision, "attributes": {"title": "a test"}} | more
    return Store.create(path, **arguments)


def block_values(block, seed=0):
    """Random values of everything that is written by blocks of prompts."""
    rng = np.random.default_rng(seed)
    sizes = SIZES | {"prompt": block.stop - block.start}
    drawn = {n: rng.normal(0, 50, [sizes[d] for d in QUANTITIES[n].dims]) for n in BY_PROMPT}
    return {n: values.astype(QUANTITIES[n].dtype("float32")) for n, values in drawn.items()}


def all_heads(value=True):
    return np.full((SIZES["layer"], SIZES["head"]), value)


def bare(path):
    """What somebody without this package sees; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return xr.open_zarr(path).load()


def failing(monkeypatch, error, after):
    """Let every write of a file fail once `after` bytes are written."""
    left, put = [after], _local._put

    def counted(path, value, *arguments, **options):
        left[0] -= len(value)
        if left[0] < 0:
            raise error
        return put(path, value, *arguments, **options)

    monkeypatch.setattr(_local, "_put", counted)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "m")


# What is in it


def test_bare_xarray_opens_the_template_without_a_warning(tmp_path):
    create(tmp_path / "s.zarr")
    found = bare(tmp_path / "s.zarr")
    assert set(found.variables) == set(QUANTITIES)
    assert set(found.coords) == set(COORDINATES)
    assert found.sizes == SIZES


def test_bare_xarray_opens_a_written_and_annotated_store_without_a_warning(tmp_path):
    store = create(tmp_path / "s.zarr")
    store.write_prompts(slice(0, 3), block_values(slice(0, 3)), all_heads())
    store.annotate(finished="now")
    assert bare(tmp_path / "s.zarr").attrs["finished"] == "now"


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    path = tmp_path_factory.mktemp("described") / "s.zarr"
    create(path)
    return xr.open_zarr(path)


@pytest.mark.parametrize("name", QUANTITIES)
def test_a_variable_describes_itself(described, name):
    found, defined = described[name], QUANTITIES[name]
    assert found.dims == defined.dims
    assert {k: found.attrs[k] for k in ("units", "long_name", "description")} == defined.attributes
    assert all(found.attrs[k].strip() for k in ("units", "long_name", "description"))
    assert {"float": "f", "int": "i", "bool": "b", "string": "T"}[defined.kind] == found.dtype.kind


def test_coordinates_are_read_back_as_they_were(tmp_path):
    create(tmp_path / "s.zarr")
    found = bare(tmp_path / "s.zarr")
    for name, values in coordinates().items():
        np.testing.assert_array_equal(found[name].values.astype(object), values.astype(object), err_msg=name)


def test_texts_work_as_labels(tmp_path):
    labels = [f"L{i}" for i in range(4)] + ["L9.attention_bias" * 40]
    create(tmp_path / "s.zarr", coordinates=coordinates() | {"component": labels})
    found = bare(tmp_path / "s.zarr")
    assert found.component_change.sel(component=labels[-1]).shape == (2, 3, 7, 4)


def test_attributes_survive_json(tmp_path):
    nested = {"settings": {"heads": ["L0H1"], "share": None, "λ": "é🙂"}, "list": [1, 2.5, "x"]}
    plain = {"title": "naïve “quotes” 🙂", "n_layers": 12, "share": 0.02}
    store = create(tmp_path / "s.zarr", attributes=nested | plain)
    store.annotate(added={"a": [None, True]}, title="another")
    found = bare(tmp_path / "s.zarr").attrs
    assert {k: json.loads(found[k]) for k in nested} == nested
    assert json.loads(found["added"]) == {"a": [None, True]}
    assert {k: found[k] for k in plain} == plain | {"title": "another"}
    assert found.items() <= store.attributes.items()


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")]
)
def test_a_run_is_stored_in_the_models_precision_but_at_least_float32(tmp_path, model, dtype, expected):
    found = sr.run(model=str(model), prompts=ids(tmp_path / "p.npy"), out=tmp_path / "s.zarr", dtype=dtype)
    floats = {
        n: v.dtype.name for n, v in bare(found.encoding["source"]).data_vars.items() if v.dtype.kind == "f"
    }
    assert set(SWEPT) < set(floats)
    assert set(floats.values()) == {expected}


def test_float64_is_stored_to_the_last_bit(tmp_path):
    store = create(tmp_path / "s.zarr", "float64")
    values = np.random.default_rng(0).normal(size=(3, 4))
    store.write_prompts(slice(3, 6), {"logit": values}, all_heads())
    assert bare(tmp_path / "s.zarr").logit[3:6].values.tobytes() == values.tobytes()


def test_a_run_holds_what_the_contract_lists_and_all_its_provenance(tmp_path, model):
    sr.run(
        model=str(model),
        prompts=ids(tmp_path / "p.npy"),
        out=tmp_path / "s.zarr",
        components="all",
        layers="1:",
    )
    found = bare(tmp_path / "s.zarr")
    assert set(found.data_vars) == {"done", "selected", "noise_floor", "threshold", *CLEAN, *SWEPT, *COMPONENT}
    tokens = {"token", "target", "token_text", "target_text", "counted", "document", "partner", "ablation"}
    terms = {"component", "component_kind", "component_layer", "component_head"}
    assert set(found.coords) == {"layer", "head", "head_label", "prompt", "position"} | tokens | terms
    assert found.sizes == {"layer": 2, "head": 5, "prompt": 6, "position": 6, "component": 3 * 7 + 2}
    assert found.component_change.sel(component="L2H4").notnull().all()
    assert found.done.all()
    assert (found.noise_floor >= 0).all()
    attributes = found.attrs
    provenance = json.loads(attributes["provenance"])
    assert attributes["command"].startswith("selfrepair_nn.run('heads', model=")
    assert attributes["created"] <= attributes["finished"]
    assert {
        "dtype",
        "backend",
        "target",
        "ablation",
        "value_bias",
        "freeze",
        "identity",
        "fingerprint",
    } < set(attributes)
    assert {"torch", "nnsight", "transformers", "zarr", "python"} < set(provenance["versions"])
    assert provenance["prompts"]["sha256"] == json.loads(attributes["settings"])["prompts"]
    assert {"git", "machine", "revision", "seed"} < set(provenance)


def test_the_done_map_tells_not_computed_from_nan(tmp_path, model):
    choices = dict(
        model=str(model), prompts=ids(tmp_path / "p.npy"), heads="0.1,2.3", components="top", share=0.1
    )
    sr.run(out=tmp_path / "s.zarr", **choices)
    found = bare(tmp_path / "s.zarr")
    assert found.layer.values.tolist() == [0, 2]
    assert found["head"].values.tolist() == [1, 3]
    selected = found.sel(layer=[0, 2], head=[1, 3]).selected.values
    np.testing.assert_array_equal(selected, [[True, False], [False, True]])
    np.testing.assert_array_equal(found.done, np.repeat(selected[:, :, None], 6, axis=2))
    assert found.self_repair.isnull().where(found.done).sum() == 0
    assert found.self_repair.where(~found.done).isnull().all()
    kept = found.component_change.notnull().all("component").where(found.done).sum(("prompt", "position"))
    np.testing.assert_array_equal(kept, [[3, 0], [0, 3]])  # 10% of 36 tokens; NaN, and done, on the others


# How it is written


def test_a_block_is_written_and_nothing_else(tmp_path):
    store = create(tmp_path / "s.zarr")
    values = block_values(slice(3, 6))
    store.write_prompts(slice(3, 6), values, all_heads())
    found = bare(tmp_path / "s.zarr")
    for name in BY_PROMPT:
        dims = QUANTITIES[name].dims
        np.testing.assert_array_equal(found[name].isel(prompt=slice(3, 6)).transpose(*dims), values[name])
        others = found[name].isel(prompt=[0, 1, 2, 6])
        assert (others == -1).all() if QUANTITIES[name].kind == "int" else others.isnull().all()
    np.testing.assert_array_equal(found.done.any(("layer", "head")), [False] * 3 + [True] * 3 + [False])


def test_the_last_short_block_is_written_and_nothing_else(tmp_path):
    store = create(tmp_path / "s.zarr")
    for block in (slice(3, 6), slice(6, 7)):
        store.write_prompts(block, block_values(block, block.start), all_heads())
    found = bare(tmp_path / "s.zarr")
    for block in (slice(3, 6), slice(6, 7)):
        expected = block_values(block, block.start)
        np.testing.assert_array_equal(found.self_repair[:, :, block], expected["self_repair"])
        np.testing.assert_array_equal(found.component_change[:, :, block], expected["component_change"])
    assert found.self_repair[:, :, :3].isnull().all()
    np.testing.assert_array_equal(found.done[0, 0], [False] * 3 + [True] * 4)


def test_only_the_heads_of_a_run_are_marked(tmp_path):
    store = create(tmp_path / "s.zarr")
    marked = all_heads(False)
    marked[1, 2] = True
    store.write_prompts(slice(0, 3), block_values(slice(0, 3)), marked)
    assert int(store.done.sum()) == 3
    assert store.done[1, 2, :3].all()


@pytest.mark.parametrize("block", [slice(0, 3), slice(3, 6), slice(6, 7)])
def test_writing_touches_the_blocks_own_chunks_only(tmp_path, block):
    """Not the coordinates, not the metadata, not another block's files: what is on disk cannot be harmed.

    Of what was there already only the block's own mark changes, which has been false from the beginning.
    """
    store = create(tmp_path / "s.zarr")
    others = [b for b in (slice(0, 3), slice(3, 6), slice(6, 7)) if b != block]
    for other in others:
        store.write_prompts(other, block_values(other), all_heads())
    before = files(tmp_path / "s.zarr")
    store.write_prompts(block, block_values(block), all_heads())
    after = files(tmp_path / "s.zarr")
    mark = f"done/c/0/0/{block.start // PER_CHUNK}"
    assert {name for name in before if after[name] != before[name]} == {mark}
    new = {tuple(Path(name).parts) for name in after.keys() - before.keys()}
    assert {parts[0] for parts in new} == {*BY_PROMPT, "checksums"}
    new.remove(("checksums", f"{block.start // PER_CHUNK}.json"))
    for (
        variable,
        *_,
    ) in new:
        where = QUANTITIES[variable].dims.index("prompt")
        chunks = {parts[2:][where] for parts in new if parts[0] == variable}
        assert chunks == {str(block.start // PER_CHUNK)}, variable


def test_a_chunk_is_a_block_of_prompts(tmp_path):
    create(tmp_path / "s.zarr")
    group = zarr.open_group(tmp_path / "s.zarr", mode="r")
    for name in (*BY_PROMPT, "done"):
        dims = QUANTITIES[name].dims
        assert group[name].chunks[dims.index("prompt")] == PER_CHUNK
    assert group["self_repair"].chunks == (2, 3, PER_CHUNK, 4)
    assert group["component_change"].chunks == (1, 3, PER_CHUNK, 4, 5)


def test_a_block_is_marked_last(tmp_path, monkeypatch):
    """Whenever the process dies, what is marked is stored, and its checksums before it."""
    store, written, put = create(tmp_path / "s.zarr"), [], _local._put

    def noted(path, *arguments, **options):
        written.append(Path(path).relative_to(tmp_path / "s.zarr").parts[0])
        return put(path, *arguments, **options)

    monkeypatch.setattr(_local, "_put", noted)
    store.write_prompts(slice(0, 3), block_values(slice(0, 3)), all_heads())
    assert written[-1] == "done"
    assert written.count("done") == 1
    assert written[0] == "checksums"
    assert set(written[1:-1]) == set(BY_PROMPT)


@pytest.mark.parametrize("after", [0, 100, 1500])
def test_a_full_disk_leaves_the_block_unmarked_and_the_others_alone(tmp_path, monkeypatch, after):
    store = create(tmp_path / "s.zarr")
    store.write_prompts(slice(0, 3), block_values(slice(0, 3)), all_heads())
    before = files(tmp_path / "s.zarr")
    failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device"), after)
    with pytest.raises(StoreError, match=r"No space left on device.*resume"):
        store.write_prompts(slice(3, 6), block_values(slice(3, 6)), all_heads())
    monkeypatch.undo()
    assert not store.done[:, :, 3:].any()
    assert before.items() <= files(tmp_path / "s.zarr").items()
    store.write_prompts(slice(3, 6), block_values(slice(3, 6)), all_heads())
    assert bare(tmp_path / "s.zarr").self_repair[:, :, :6].notnull().all()


def test_half_a_chunk_on_disk_is_written_over(tmp_path):
    """A machine that lost power may leave a torn file: as it is not marked, it is never read."""
    store = create(tmp_path / "s.zarr")
    block = slice(6, 7)
    store.write_prompts(block, block_values(block), all_heads(False))
    torn = [p for p in (tmp_path / "s.zarr").rglob("c/**/2/0*") if p.is_file() and "done" not in str(p)]
    assert torn
    for path in torn:
        path.write_bytes(path.read_bytes()[:9])
    store.write_prompts(block, block_values(block, 1), all_heads())
    found = bare(tmp_path / "s.zarr")
    np.testing.assert_array_equal(found.self_repair[:, :, block], block_values(block, 1)["self_repair"])


@pytest.mark.parametrize("wrong", [(2, 3, 2, 4), (2, 3, 1, 4), (1, 3, 3, 4), (2, 3, 3, 5), (2, 3, 4)])
def test_values_of_another_shape_are_refused_and_not_marked(tmp_path, wrong):
    store = create(tmp_path / "s.zarr")
    with pytest.raises((StoreError, ValueError)):
        store.write_prompts(slice(0, 3), {"self_repair": np.ones(wrong, "f4")}, all_heads())
    assert not store.done.any()


# How it is made


def test_the_final_name_appears_last(tmp_path, monkeypatch):
    """At every write of its creation there is no store yet: whenever it is killed, none is half made."""
    path, put, seen = tmp_path / "s.zarr", _local._put, []

    def checked(*arguments, **options):
        seen.append(path.exists())
        return put(*arguments, **options)

    monkeypatch.setattr(_local, "_put", checked)
    create(path)
    assert len(seen) > 2 * len(QUANTITIES)
    assert not any(seen)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError])
@pytest.mark.parametrize("after", [0, 2000, 9000])
def test_a_creation_that_fails_leaves_nothing(tmp_path, monkeypatch, error, after):
    failing(monkeypatch, error, after)
    expected = StoreError if isinstance(error, OSError) else error
    with pytest.raises(expected):
        create(tmp_path / "s.zarr")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    create(tmp_path / "s.zarr")


@pytest.mark.parametrize("after", [0, 1, 12])
def test_a_creation_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch, after):
    """Ctrl-C always arrives in the main thread, while zarr writes in one of its own."""
    add, left = store_room._add_array, iter(range(after))

    def interrupted(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        add(*arguments)

    monkeypatch.setattr(store_room, "_add_array", interrupted)
    with pytest.raises(KeyboardInterrupt):
        create(tmp_path / "s.zarr")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    create(tmp_path / "s.zarr")


def test_a_creation_that_fails_at_its_last_step_leaves_nothing(tmp_path, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(store_room, "_consolidate", killed)
    with pytest.raises(KeyboardInterrupt):
        create(tmp_path / "s.zarr")
    assert list(tmp_path.iterdir()) == []


def test_a_creation_never_replaces_a_store(tmp_path):
    create(tmp_path / "s.zarr").write_prompts(slice(0, 3), block_values(slice(0, 3)), all_heads())
    before = files(tmp_path)
    with pytest.raises(StoreError, match=r"s\.zarr"):
        create(tmp_path / "s.zarr")
    assert files(tmp_path) == before


# What is not a store


def nothing(path):
    pass


def empty(path):
    path.mkdir()


def somebodys_directory(path):
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")


def somebodys_file(path):
    path.write_text("years of work")


def somebodys_dataset(path):
    xr.Dataset({"temperature": ("x", [1.5, 2.5])}).to_zarr(path, consolidated=False)


def somebodys_array(path):
    zarr.create_array(path, shape=3, dtype="i4")


def broken_metadata(path):
    path.mkdir()
    (path / "zarr.json").write_text('{"zarr_format": 3, ')


def other_format(path):
    zarr.open_group(path, mode="w", attributes={"format": 99})


FOREIGN = (
    empty,
    somebodys_directory,
    somebodys_file,
    somebodys_dataset,
    somebodys_array,
    broken_metadata,
    other_format,
)


@pytest.mark.parametrize("make", [nothing, *FOREIGN])
def test_opening_what_is_no_store_names_it(tmp_path, make):
    make(tmp_path / "s.zarr")
    with pytest.raises(StoreError, match=r"s\.zarr.*") as caught:
        open_store(tmp_path / "s.zarr")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


@pytest.mark.parametrize("make", FOREIGN)
def test_a_run_never_touches_what_is_no_store(tmp_path, model, make):
    make(tmp_path / "s.zarr")
    before = files(tmp_path)
    prompts = ids(tmp_path / "p.npy")
    ended = selfrepair("run", "heads", "--model", model, "--prompts", prompts, "--out", tmp_path / "s.zarr")
    assert ended.code == 1
    assert "not a store of selfrepair_nn" in ended.err
    assert (tmp_path / "s.zarr").is_dir() == (make is not somebodys_file)
    assert before.items() <= files(tmp_path).items()
    assert {n for n in files(tmp_path) if n.startswith("s.zarr")} == {
        n for n in before if n.startswith("s.zarr")
    }


def test_a_store_is_opened_with_its_path_and_variables_in_order(tmp_path):
    create(tmp_path / "s.zarr")
    found = open_store(str(tmp_path / "s.zarr"))
    assert found.encoding["source"] == str(tmp_path / "s.zarr")
    assert list(found.data_vars) == list(DATA)
    assert not any(v._in_memory for v in found.variables.values() if v.ndim > 2)


# What must not be in it


def test_no_secret_of_the_environment_is_stored(tmp_path, monkeypatch, model):
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "NDIF_API_KEY", "NNSIGHT_API_KEY", "AWS_SECRET_ACCESS_KEY")
    for name in names:
        monkeypatch.setenv(name, f"marker-{name}-marker")
    ended = selfrepair(
        "run", "heads", "--model", model, "--prompts", ids(tmp_path / "p.npy"), "--out", tmp_path / "o"
    )
    assert ended.code == 0, ended.err
    written = [p for p in (tmp_path / "o").rglob("*") if p.is_file()]
    assert len(written) > 2 * len(SWEPT)
    assert not [p for p in written if b"marker" in p.read_bytes()]
    found = bare(tmp_path / "o" / f"heads-{model.name}-p.zarr")
    assert "marker" not in repr(found.attrs)
    assert not [
        n for n, v in found.variables.items() if v.dtype.kind == "T" and "marker" in repr(v.values.tolist())
    ]
    assert "marker" not in ended.out + ended.err
