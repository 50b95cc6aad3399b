"""Vectors of their own for sites, and Gaussian noise: what they are, and that they are the same wherever they run."""

from math import cos, log, pi, sqrt
from types import SimpleNamespace

import families
import numpy as np
import oracle_edits
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from test_edits import close, means, prompts

import selfrepair_nn as sr
from selfrepair_nn.components import Attention, Head, Layers, Mlp, Neuron
from selfrepair_nn.constants import Constants
from selfrepair_nn.errors import SelfRepairError, UsageError
from selfrepair_nn.graph import Graph
from selfrepair_nn.replacements import Noise
from selfrepair_nn.tracing.gaussian import gaussian
from selfrepair_nn.tracing.jobs import ablation_job
from selfrepair_nn.tracing.session import run_session

SEEDS = np.array([3, -5, 2**62, 0])
PLACE = SimpleNamespace(order=np.arange(4), precision="float64", noise_seeds=lambda block: SEEDS[block])


def measured(model, name, ablate, replacement, part=slice(0, 4), **graph):
    """The engine on some prompts of the block."""
    arrays = {key: value[part] for key, value in prompts(name).items()}
    given = {} if isinstance(replacement, str) else replacement.arrays(PLACE, part)
    arrays |= {key: torch.as_tensor(value) for key, value in given.items()}
    if replacement == "mean":
        arrays["means"] = means(name)
    plan = Graph(ablate=tuple(ablate), replacement=replacement, **graph).plan(model.layout)
    found = run_session(ablation_job, model.nn, arrays, plan | {"tokens_per_pass": 10**4})
    return {key: value.numpy() for key, value in found.items()}


def agree(name, found, cases, values, value_bias="output"):
    """As whole passes of the real model with these values in the sites' places."""
    them = oracle_edits.Edited(families.build(name, exact=True), prompts(name), "centred", value_bias)
    for index, case in enumerate(cases):
        given = {site: values(site, them) for site in case}
        theirs = them.case(case, ("given", given))
        for part in theirs.keys() & found.keys():
            close(found[part][index], theirs[part], err_msg=part)


# ---------------------------------------------------------------- constants


CONVENTIONS = [("gpt2", "output"), ("llama-gqa", "head"), ("neox-parallel", "output")]


@pytest.mark.parametrize(("name", "value_bias"), CONVENTIONS)
def test_a_vector_for_each_site(wrapped, name, value_bias):
    model = wrapped(name, exact=True)
    s, rng = model.structure, np.random.default_rng(0)
    vectors = {Head(0, 1): rng.normal(size=s.d_head), Mlp(1): torch.from_numpy(rng.normal(size=s.d_model))}
    vectors |= {Neuron(1, 4): [0.75], Attention(2): rng.normal(size=(s.n_heads, s.d_head)), Neuron(0, 2): [-1.0]}
    constants = Constants(vectors)
    whole = tuple(("head", 2, head) for head in range(s.n_heads))
    ablate = [(Head(0, 1),), (Neuron(1, 4), Neuron(0, 2)), (Mlp(1), Head(0, 1)), (Attention(2),)]
    cases = [(("head", 0, 1),), (("neuron", 1, 4), ("neuron", 0, 2)), (("mlp", 1), ("head", 0, 1)), whole]

    def values(site, them):
        kind, *numbers = site
        found = constants[{"head": Head, "mlp": Mlp, "neuron": Neuron}[kind](*numbers)]
        return torch.tensor(found if kind != "neuron" else found[0]).expand_as(them._value(site, them.clean))

    agree(name, measured(model, name, ablate, constants, value_bias=value_bias), cases, values, value_bias)


def test_vectors_that_are_the_means_are_mean_ablation(wrapped):
    model, name = wrapped("gpt2", exact=True), "gpt2"
    width, ablate = model.structure.d_head, [(Head(1, 2), Mlp(0)), (Head(2, 0),)]
    z = {layer: x.unflatten(0, (-1, width)) for layer, x in means(name)["z"].items()}
    given = Constants({Head(1, 2): z[1][2], Head(2, 0): z[2][0], Mlp(0): means(name)["mlp"][0]})
    mean, vectors = (measured(model, name, ablate, by) for by in ("mean", given))
    for part, values in mean.items():
        close(vectors[part], values, err_msg=part)


def test_what_constants_there_are(wrapped):
    """Each site has one, as wide as its value; else the error says which, and what there is."""
    s = wrapped("gpt2", exact=True).structure
    ones = np.ones((s.n_heads, s.d_head))
    constants = Constants({Head(0, 1): np.zeros(s.d_head), Attention(2): ones, Mlp(0): [1.0]})
    for case, told in (
        ((Head(0, 1), Attention(2)), None),
        ((Head(0, 2),), "L0H2 has no constant; there are L0H1, L2H0, L2H1, L2H2, L2H3, L2H4, L0.mlp"),
        ((Attention(0),), "L0H0 has no constant; there are L0H1, L2H0"),
        ((Mlp(0),), f"L0.mlp holds {s.d_model} numbers, its constant 1"),
    ):
        found = Graph(ablate=(case,), replacement=constants).misfit(s)
        assert found == told or (told and found.startswith(told))
    of_layer = [site.label for site, _ in constants.of([Attention(2)]).vectors]
    assert of_layer == [f"L2H{head}" for head in range(s.n_heads)]
    with pytest.raises(UsageError, match="L1H1 has no constant"):
        constants.of([Head(1, 1)])
    with pytest.raises(UsageError, match="layer 1: whole layers are ablated alone, beside a replacement of resample"):
        Graph(ablate=((Layers(1, 2),),), replacement=constants)
    for wrong, told in (
        ({}, "has no vector: give {site: vector}"),
        ({Head(0, 0): ["a"]}, "constant of L0H0 must be a vector of numbers"),
        ({Head(0, 0): [float("nan")]}, "constant of L0H0 must be a vector of finite numbers"),
        ({Head(0, 0): 3.0}, "constant of L0H0 must be a vector of finite numbers, not 3.0"),
        ({"L0H0": [1.0]}, "constant of 'L0H0': constants are of a Head"),
        ({Layers(0, 1): [1.0]}, "constant of layer 0: constants are of a Head"),
        (3, "Constants"),
    ):
        with pytest.raises(UsageError, match=told):
            Constants(wrong)


def test_constants_in_a_file(tmp_path):
    """They are the same afterwards, whatever is said about them; what is no such file is told."""
    given = Constants({Head(1, 2): [0.1, 1e-9], Neuron(0, 3): [5.0], Head(0, 0): [3.0, 4.0]}, {"steps": 7})
    read = Constants.load(given.save(tmp_path / "x.npz"))
    assert (read, read.word, read.about) == (given, given.word, {"steps": 7})
    assert Graph(ablate=((Head(1, 2),),), replacement=read).digest == Graph(((Head(1, 2),),), given).digest
    assert Constants({Head(1, 2): [0.1, 1.1e-9]}).word != Constants({Head(1, 2): [0.1, 1e-9]}).word
    np.savez(tmp_path / "y.npz", z=np.zeros(3))
    (tmp_path / "z.npz").write_text("nothing")
    for name, told in (("none", "does not exist"), ("y", "holds no constants"), ("z", "holds no constants")):
        with pytest.raises(UsageError, match=told):
            Constants.load(tmp_path / f"{name}.npz")
    with pytest.raises(UsageError, match="cannot be written"):
        given.save(tmp_path / "no" / "x.npz")


# ---------------------------------------------------------------- noise


def drawn(seed, numbers, place):
    """Two of SplitMix64's draws as one normal number, in Python's integers."""

    def mixed(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    state = seed % 2**64
    for number in numbers:
        state = mixed((state + number) % 2**64)
    one, other = (mixed((mixed(state) + 2 * place + i) % 2**64) >> 11 for i in (0, 1))
    return sqrt(-2 * log((one + 0.5) / 2**53)) * cos(2 * pi * other / 2**53)


def test_splitmix64():
    """Its first numbers from seed 1234567, as its authors' code gives them."""
    from selfrepair_nn.tracing.gaussian import _mixed

    states = (np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
    found = _mixed(torch.from_numpy(states)).numpy().view(np.uint64).tolist()
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_noise_is_normal_and_independent():
    found = gaussian(torch.arange(40), [122, 3, 1], torch.Size([40, 50, 20])).numpy()
    assert abs(found.mean()) < 0.02
    assert abs(found.std() - 1) < 0.02
    assert abs((found**4).mean() - 3) < 0.15
    assert abs(np.sort(found.ravel())[-1] - 4) < 1.2
    flat = found.reshape(40, -1)
    for one, other in ((flat[:-1], flat[1:]), (flat[:, :-1], flat[:, 1:]), (flat[:, :-20], flat[:, 20:])):
        assert abs((one * other).mean()) < 0.02
    other = gaussian(torch.arange(40), [122, 3, 2], torch.Size([40, 50, 20])).numpy()
    assert abs((found * other).mean()) < 0.02
    shorter = gaussian(torch.arange(40)[7:9], [122, 3, 1], torch.Size([2, 30, 20])).numpy()
    assert_array_equal(shorter, found[7:9, :30])


@pytest.mark.parametrize(("name", "value_bias"), [("gpt2", "output"), ("gpt2", "head"), ("llama-gqa", "output")])
def test_noise(wrapped, name, value_bias):
    """Added to each site's value, `scale` times as long as that in the mean; of the prompt's seed and the site."""
    model, scale = wrapped(name, exact=True), 0.5
    ablate = [(Head(1, 2),), (Mlp(0), Neuron(2, 3)), (Mlp(2),)]
    cases = [(("head", 1, 2),), (("mlp", 0), ("neuron", 2, 3)), (("mlp", 2),)]

    def values(site, them):
        value = them._value(site, them.clean)
        kind, *numbers = site
        varied = (value - them._constant(site)).reshape(4, 8, -1)
        told = [*{"head": b"z", "mlp": b"mlp", "neuron": b"neurons"}[kind], *numbers]
        width = varied.shape[-1]
        numbers = [[drawn(int(seed), told, i) for i in range(8 * width)] for seed in SEEDS]
        noise = torch.tensor(numbers, dtype=torch.float64).reshape(4, 8, width)
        noise = scale * varied.square().mean(-1, keepdim=True).sqrt() * noise
        return value + noise.reshape(value.shape)

    found = measured(model, name, ablate, Noise(scale), value_bias=value_bias)
    agree(name, found, cases, values, value_bias)
    alone = measured(model, name, ablate, Noise(scale), slice(1, 2), value_bias=value_bias)
    close(alone["logit_change"][:, 0], found["logit_change"][:, 1])
    assert not np.any(measured(model, name, ablate, Noise(0))["from_mlps"])


RECIPE = """
"Constants and noise."
import selfrepair_nn as sr

def graph(structure, options):
    heads = [sr.Head(1, 0), sr.Head(2, 1)]
    vectors = sr.Constants({head: [0.25 + head.head] * structure.d_head for head in heads})
    by = {"vectors": vectors, "noise": sr.Noise(1.0), "less": sr.Noise(0.1)}
    return sr.Variants("by", {name: sr.Graph(ablate=sr.sweep(heads), replacement=one) for name, one in by.items()})
"""


@pytest.fixture
def stored(wrapped, seeded, tmp_path):
    def run(name="x", recipe=RECIPE, **choices):
        (tmp_path / "mine.py").write_text(recipe)
        choices = {"prompts": seeded("llama-gqa"), "progress": False, "out": tmp_path / f"{name}.zarr"} | choices
        return sr.run(tmp_path / "mine.py", model=wrapped("llama-gqa", exact=True), **choices).load()

    return run


def test_the_same_whatever_the_blocks_and_wherever(stored):
    """In blocks of any size, in shards, and sent as to a server."""
    whole = stored("whole", seed=3)
    parts = stored("parts", seed=3, batch_size=1, shard="1/2"), stored("parts", seed=3, batch_size=1, shard="2/2")
    found = [parts[1], stored("sent", seed=3, batch_size=3, backend="simulated")]
    for other in found:
        for part in ("logit_change", "ablated_direct_effect"):
            assert_allclose(other[part], whole[part], rtol=0, atol=1e-10)
    change = np.abs(whole.logit_change).mean(("layer", "head", "prompt", "position"))
    assert change.sel(by="noise") > 2 * change.sel(by="less") > 0
    other = stored("other", seed=4).logit_change - whole.logit_change
    assert np.abs(other.sel(by="noise")).max() > 1e-3
    assert not other.sel(by="vectors").where(whole.selected, 0).any()


def test_other_vectors_or_another_seed_are_another_run(stored):
    """The same are resumed."""
    first = stored()
    assert stored().identical(first)
    with pytest.raises(SelfRepairError, match="something else is done to them"):
        stored(recipe=RECIPE.replace("0.25", "0.250001"))
    with pytest.raises(SelfRepairError, match="seed"):
        stored(seed=1)
