"""Checkpoints of a model in one store: each as by itself, resumed, compared, refused where they are not one model's."""

import json
import shutil

import families
import numpy as np
import pytest
import torch
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal
from terminal import selfrepair

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.errors import Incomplete, StoreError, UsageError
from selfrepair_nn.explorer.contents import Contents
from selfrepair_nn.figures import training
from selfrepair_nn.running import run as running
from selfrepair_nn.store import open_store

STEPS = ("step0", "step3", "step20")
CHOICES = {"heads": "0.*,2.1", "batch_size": 7, "length": 8, "share": 0.2, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of a tiny model: as it is drawn, and after some steps of training on a few tokens."""
    from test_sandbox import save_with_tokenizer

    found = tmp_path_factory.mktemp("checkpoints")
    save_with_tokenizer("neox-parallel", str(found / "step0"))
    model = families.build("neox-parallel").float()
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.as_tensor(families.random_ids(model, 8))
    for step in range(1, 21):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if f"step{step}" in STEPS:
            shutil.copytree(found / "step0", found / f"step{step}")
            model.save_pretrained(found / f"step{step}")
    return found


@pytest.fixture(scope="module")
def prompts():
    return families.random_ids(families.build("neox-parallel"), 25, 8)


@pytest.fixture(scope="module")
def both(folder, prompts, tmp_path_factory):
    """The store of all, and one of each by itself."""
    out, given = tmp_path_factory.mktemp("revisions"), CHOICES | {"prompts": prompts}
    every = sr.run(model=folder, revisions=STEPS, out=out / "all.zarr", **given)
    return every, {s: sr.run(model=folder / s, out=out / f"{s}.zarr", **given) for s in STEPS}


def test_each_is_what_it_is_by_itself_bit_for_bit(both):
    every, alone = both
    assert [*map(str, every.revision.values)] == [*STEPS]
    for step, ds in alone.items():
        one = every.sel(revision=step).drop_vars("revision")
        xr.testing.assert_equal(one.load(), ds.load())
        assert_array_equal(every.noise_floor.sel(revision=step), ds.noise_floor)
    assert not np.allclose(every.direct_effect[0], every.direct_effect[1], equal_nan=True)
    kept = json.loads(every.attrs["revisions"])
    assert [kept[step]["fingerprint"] for step in STEPS] == [alone[step].attrs["fingerprint"] for step in STEPS]
    assert len({each["fingerprint"] for each in kept.values()}) == 3


def test_bare_xarray_opens_it_and_nothing_else_is_left(both, tmp_path):
    every, _alone = both
    path = every.encoding["source"]
    assert sr.verify(path) == []
    xr.testing.assert_equal(xr.open_zarr(path).logit.load(), every.logit.load())
    left = sorted(p.name for p in every_folder(path).iterdir() if "step" not in p.name)
    assert left == ["all.zarr"]


def every_folder(path):
    from pathlib import Path

    return Path(path).parent


def test_summaries_are_those_of_each(both):
    every, alone = both
    found = sr.by_variant(every, 0.2)
    for step, ds in alone.items():
        own, one = sr.by_head(ds, 0.2), found.sel(revision=step)
        for name in ("direct_effect", "top_self_repair", "top_self_repair_half_width", "noise_floor"):
            assert_array_equal(one[name].values, own[name].values)
    assert found.top_direct_effect.dims == ("revision", "layer", "head")
    with pytest.raises(UsageError, match=r"choose one, as ds\.sel"):
        sr.by_head(every)
    assert_array_equal(sr.by_head(every.sel(revision="step3"), 0.2).top_self_repair, found.top_self_repair[1])
    with pytest.raises(UsageError, match="each revision is another model"):
        sr.differences(every, 0.2)


def test_figures_pages_and_words_treat_the_axis(both, tmp_path):
    every, _alone = both
    assert figures.suited(every) == ["training"]
    drawn = figures.draw("training", every, share=0.2)
    means = sr.by_variant(every, 0.2)
    line = next(each for each in drawn.axes[0].lines if each.get_label() == "self-repair")
    wanted = means.top_self_repair.where(means.tokens > 0).mean(("layer", "head"))
    assert_allclose(line.get_ydata(), wanted)
    assert_allclose(line.get_xdata(), [0, 3, 20])
    assert figures.draw("variants", every, share=0.2).axes
    assert "step20" in str(sr.summary(every))
    assert "4 heads" in str(sr.summary(every))
    page = sr.write_report(every, tmp_path / "page.html").read_text()
    assert "step20" in page
    data = Contents.of(every, 0.2).data()
    assert data["axes"] == [{"name": "revision", "labels": [*STEPS]}]
    assert len(data["tokens"]["variants"]) == 3


def test_the_explorer_shows_the_top_tokens_of_each(both):
    every, alone = both
    entries = Contents.of(every, 0.2).entries
    for index, step in enumerate(STEPS):
        top = sr.top_share(alone[step], 0.2).values
        assert entries.tops[index].token.size == top.sum()
        own = entries.tops[index]
        assert np.isin(own.case * 10**6 + own.token, entries.top.case * 10**6 + entries.top.token).all()
    assert entries.top.token.size > entries.tops[0].token.size
    assert (np.diff(entries.top.token) >= 0).all()


@pytest.mark.parametrize(
    ("labels", "numbered"),
    [(["step0", "step3"], True), (["check-5", "check-40"], True), (["main", "v1"], False), (["2", "1"], False)],
)
def test_steps_are_read_off_names(labels, numbered):
    ds = xr.Dataset(coords={"revision": labels})
    assert training.steps(ds)[1] == numbered


# ---------------------------------------------------------------- resumed, compared, mended




def test_it_resumes_within_a_revision(both, folder, prompts, tmp_path, monkeypatch):
    every, out, count = both[0], tmp_path / "all.zarr", []
    given = CHOICES | {"prompts": prompts, "model": folder, "revisions": ",".join(STEPS), "out": out}
    fill = running._fill

    def interrupted(*arguments):
        for block in fill(*arguments):
            count.append(block)
            yield block
            if len(count) == 6:  # of four each: the second revision is half done
                raise KeyboardInterrupt

    monkeypatch.setattr(running, "_fill", interrupted)
    with pytest.raises(Incomplete, match="the same command resumes"):
        sr.run(**given)
    half = open_store(out)
    done = half.done.any(("layer", "head")).sum("prompt").values.tolist()
    assert done == [25, 14, 0]
    assert "finished" not in half.attrs
    assert np.isfinite(half.noise_floor[:2]).all()
    assert np.isnan(half.noise_floor[2]).all()
    assert "step20" in str(sr.summary(half))
    xr.testing.assert_equal(half.isel(revision=0).load(), every.isel(revision=0).load())
    whole = sr.run(**given)
    assert len(count) == 6 + 2 + 4
    xr.testing.assert_equal(whole.load(), every.load())
    sr.run(**given)
    assert len(count) == 12  # nothing again


def test_other_weights_under_a_name_are_refused(both, folder, prompts, tmp_path):
    place = tmp_path / "moved"
    shutil.copytree(folder, place)
    given = CHOICES | {"prompts": prompts, "model": place, "revisions": STEPS[:2], "out": tmp_path / "x.zarr"}
    sr.run(**given)
    shutil.copy(folder / "step20" / "model.safetensors", place / "step3" / "model.safetensors")
    with pytest.raises(StoreError, match="under revision 'step3' than it is now"):
        sr.run(**given)
    with pytest.raises(StoreError, match="holds another run"):
        sr.run(**given | {"revisions": ["step0", "step20"]})


def test_what_is_damaged_alone_is_computed_again(both, folder, prompts, tmp_path, monkeypatch):
    every, out, count = both[0], tmp_path / "all.zarr", []
    shutil.copytree(every.encoding["source"], out)
    (out / "logit_change" / "c" / "0" / "0" / "0" / "2" / "0").unlink()
    assert [each.block for each in sr.verify(out)] == [2]
    fill = running._fill
    monkeypatch.setattr(running, "_fill", lambda *given: (count.append(each) or each for each in fill(*given)))
    found = sr.run(**CHOICES | {"prompts": prompts, "model": folder, "revisions": STEPS, "out": out})
    assert [block.start for block in count] == [14, 14, 14]
    xr.testing.assert_equal(found.load(), every.load())
    assert sr.verify(out) == []


def test_workers_and_shares_are_as_ever(both, folder, prompts, tmp_path):
    given = CHOICES | {"prompts": prompts, "model": folder, "revisions": STEPS[:2], "select": "top-share"}
    found = sr.run(out=tmp_path / "x.zarr", **given)
    for index, step in enumerate(STEPS[:2]):
        top = sr.top_share(both[1][step], 0.2).values
        assert_array_equal(np.isfinite(found.self_repair.values[index]), top)
    assert found.threshold.dims == ("revision", "layer", "head")


# ---------------------------------------------------------------- refused, before anything is loaded


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def loaded(*given):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("selfrepair_nn.running.run.loaded", loaded)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"revisions": "step0,step0"}, "named 2 times"),
        ({"revisions": ""}, "write names with commas"),
        ({"revisions": "step0,step9"}, "'step9' is no directory"),
        ({"revisions": "step0", "until_ci": 0.1}, "stops each model elsewhere"),
        ({"revisions": "step0", "shard": "1/2"}, "has no parts"),
        ({"revisions": "step0", "resamples": 3}, "an axis of their own"),
        ({"revisions": "step0", "revision": "main"}, "give only one of both"),
        ({"revisions": "step0", "recipe": "ablation_kinds"}, "an axis of its own, ablation"),
        ({"revisions": "step0", "recipe": "neurons", "param": "count=1"}, "finds its heads by a clean pass"),
    ],
    ids=lambda each: str(each)[:30],
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_what_cannot_be_combined_is_said(folder, prompts, choices, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        sr.run(**{"recipe": "heads", "model": folder, "prompts": prompts, "out": tmp_path} | choices)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_is_loaded")
def test_other_models_are_no_revisions(folder, prompts, tmp_path, wrapped):
    from test_sandbox import save_with_tokenizer

    save_with_tokenizer("neox-sequential", str(tmp_path / "other"))
    with pytest.raises(UsageError, match=r"revision 'other' is of another model than 'step0' \(parallel"):
        sr.run(revisions=[folder / "step0", tmp_path / "other"], out=tmp_path, prompts=prompts)
    shutil.copytree(folder / "step3", tmp_path / "step3")
    told = json.loads((tmp_path / "step3" / "tokenizer.json").read_text())
    first, second = list(told["model"]["vocab"])[:2]
    vocabulary = told["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "step3" / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(UsageError, match="its tokenizer is another"):
        sr.run(revisions=[folder / "step0", tmp_path / "step3"], out=tmp_path, prompts=prompts)
    with pytest.raises(UsageError, match="loaded one after the other"):
        sr.run(model=wrapped("neox-parallel"), revisions="a,b")


def test_a_plan_shows_the_whole(folder, prompts):
    given = {"prompts": prompts, "length": 8, "model": folder}
    one = sr.preview("heads", **given | {"model": folder / "step0"})
    every = sr.preview("heads", revisions=STEPS, **given)
    assert every["revisions"] == [*STEPS]
    for name in ("flops", "store_bytes", "passes", "tokens"):
        assert every[name] == 3 * one[name]


def test_the_command_takes_directories_too(folder, prompts, tmp_path):
    np.save(tmp_path / "ids.npy", prompts)
    given = ["--prompts", tmp_path / "ids.npy", "--heads", "2.1", "--share", "0.2", "--out", tmp_path]
    names = ",".join(str(folder / step) for step in STEPS[:2])
    told = selfrepair("run", "heads", "--revisions", names, *given)
    assert "step3" in told.out
    [store] = tmp_path.glob("*.zarr")
    assert open_store(store).attrs["model"] == str(folder)
    assert "revisions" in selfrepair("plan", "heads", "--revisions", names, *given).out
    assert selfrepair("plot", store).out.count("training.") == 2
