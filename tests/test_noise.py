"""Single tokens of single heads: which heads, how direct effect and logit change go together, what does not count."""

import numpy as np
import pytest
from made import hand_made

from selfrepair_nn import blocks
from selfrepair_nn.analysis import only, token_noise, top_share
from selfrepair_nn.components import Head
from selfrepair_nn.errors import UsageError
from selfrepair_nn.simulate import simulate_heads, unfinished


@pytest.fixture(scope="module")
def ds():
    return simulate_heads(6, 4, 8, 13, seed=1)


def places(tokens):
    pairs = zip(tokens["layer"].values, tokens["head"].values, strict=True)
    return [(int(layer), int(head)) for layer, head in pairs]


def test_by_hand():
    effects, changes = [[4, 2, 1], [-2, 3, 0]], [[-1, -3, 0.5], [1, -3, 1]]
    tokens = token_noise(hand_made(effects, logit_change=changes), 0.34).isel(rank=0)
    assert tokens.tokens == 6
    assert tokens.broken == 1 / 6  # 2 -> -3
    assert tokens.under == 2 / 6  # 4 -> -1 and -2 -> 1; 3 -> -3 lies on the line, 0 -> 1 has no direct effect
    assert tokens.over == 1 / 6  # 1 -> 0.5
    # sums of products about the means 4/3 and -3/4: -20.5 + 6, 34 - 6 * 16/9, 21.25 - 6 * 9/16
    assert tokens.correlation.item() == pytest.approx(-14.5 / np.sqrt(70 / 3 * 17.875))
    np.testing.assert_array_equal(tokens.top, [[True, False, False], [False, True, False]])
    assert (tokens.top_tokens, tokens.top_broken, tokens.top_under, tokens.top_over) == (2, 0, 0.5, 0)
    assert tokens.top_correlation.item() == pytest.approx(1)  # 4 -> -1, 3 -> -3
    assert tokens.noise_floor == 0.01


def test_what_never_varies_has_no_correlation():
    tokens = token_noise(hand_made([[1, 1, 1]], logit_change=[[0, 1, 2]]))
    assert np.isnan(tokens.correlation.item())
    assert np.isnan(tokens.top_correlation.item())


def test_the_heads_are_the_loudest_of_the_last_third(ds):
    means = ds.direct_effect.astype(float).mean(("prompt", "position"))
    late = sorted(((float(means[i, j]), i, j) for i in (4, 5) for j in range(4)), reverse=True)
    assert places(token_noise(ds)) == [(i, j) for _, i, j in late[:4]]
    assert places(token_noise(ds, count=2)) == [(i, j) for _, i, j in late[:2]]
    early = token_noise(ds.isel(layer=slice(0, 3)), count=3)
    everywhere = sorted(((float(means[i, j]), i, j) for i in range(3) for j in range(4)), reverse=True)
    assert places(early) == [(i, j) for _, i, j in everywhere[:3]]


def test_chosen_heads_are_all_shown(ds):
    assert sorted(places(token_noise(only(ds, heads="0.1,5.2,1.3")))) == [(0, 1), (1, 3), (5, 2)]


def test_the_values_are_those_of_the_store(ds, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 200)
    tokens, marks = token_noise(ds, 0.1), top_share(ds, 0.1)
    for rank, (layer, head) in enumerate(places(tokens)):
        for name in ("direct_effect", "logit_change"):
            np.testing.assert_array_equal(tokens[name][rank], ds[name][layer, head])
        np.testing.assert_array_equal(tokens.top[rank], marks[layer, head])
        x, y = (ds[name].values[layer, head].ravel() for name in ("direct_effect", "logit_change"))
        assert float(tokens.correlation[rank]) == pytest.approx(np.corrcoef(x, y)[0, 1])
        inside = sum(-a < b < 0 if a > 0 else 0 < b < -a for a, b in zip(x, y, strict=True))
        assert float(tokens.under[rank]) == inside / x.size
        best = np.argsort(-x, kind="stable")[: int(0.1 * x.size)]
        assert float(tokens.top_over[rank]) == np.mean(x[best] * y[best] > 0)


def test_what_is_not_done_does_not_count(ds):
    done = np.arange(8) < 5
    part, shorter = token_noise(unfinished(ds, done=done), 0.1), token_noise(ds.isel(prompt=slice(0, 5)), 0.1)
    assert places(part) == places(shorter)
    for name in ("correlation", "under", "top_under", "tokens", "top_tokens"):
        np.testing.assert_array_equal(part[name], shorter[name])
    assert part.direct_effect.isel(prompt=slice(5, 8)).isnull().all()
    assert not part.top.isel(prompt=slice(5, 8)).any()
    assert token_noise(unfinished(ds, done=False)).sizes["rank"] == 0


def test_only_some_heads_count(ds):
    kept = only(ds, "1:3", "2.*,1.0,5.1")
    assert kept.selected.values.nonzero()[0].tolist() == [1, 2, 2, 2, 2]
    assert places(token_noise(only(unfinished(ds, [Head(4, 0), Head(4, 1)]), heads="4.1"))) == [(4, 1)]
    with pytest.raises(UsageError, match=r"the store holds no head of heads '4\.2'"):
        only(unfinished(ds, [Head(4, 0)]), heads="4.2")
    with pytest.raises(UsageError, match="layers 0 to 5"):
        only(ds, layers="7")


def test_other_datasets_are_refused(ds):
    with pytest.raises(UsageError, match=r"not in \(0, 1\]"):
        token_noise(ds, 0)
    with pytest.raises(UsageError, match="lacks done"):
        token_noise(ds.drop_vars("done"))
    bare = ds.drop_vars("ablation")
    variants = bare.assign(logit_change=bare.logit_change.expand_dims(ablation=2))
    with pytest.raises(UsageError, match=r"several values of ablation: choose one, as ds.sel\(ablation=…\)"):
        token_noise(variants)
