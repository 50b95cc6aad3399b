"""Every further family against the independent oracle: all quantities, both conventions of the value bias."""

import families
import further
import numpy as np
import oracle
import pytest
from test_engine import STOCK, TIGHT, agree
from tiers import representative

CONFIGURATIONS = [("resample", "centred", "output"), ("zero", "raw", "head"), ("mean", "raw", "output")]
IN_FLOAT64 = {
    "nemotron",
    "starcoder2",
    "stablelm-sequential",
    "stablelm-parallel",
    "phi",
    "gpt-neo",
    "bloom",
    "mpt",
}
IN_FLOAT64 |= {"falcon-multi-query", "falcon-two-norms", "falcon-sequential", "phi-moe"}
"""Those of which nothing is computed in float32 whatever is asked."""


CASES = [(name, *each) for name in (*further.MODELS, *further.HYBRIDS) for each in CONFIGURATIONS]
HARDEST = "gemma2"  # norms behind sublayers, and a cap
EVERY_RUN = [case for case in CASES if case[0] == HARDEST or case[1:] == CONFIGURATIONS[0]]


@pytest.mark.parametrize("case", representative(CASES, *EVERY_RUN), ids="-".join)
def test_every_quantity(measure, wrapped, seeded, case):
    name, ablation, target, value_bias = case
    choices = {"ablation": ablation, "target": target, "value_bias": value_bias}
    dataset, ids = measure(name, exact=False, check=True, **choices), seeded(name)
    model = wrapped(name).nn._module
    expected = oracle.reference(model, ids, partners=families.derangement(len(ids)), **choices)
    agree(dataset, expected, TIGHT if name in IN_FLOAT64 else STOCK)
    assert np.abs(dataset.closure).max() < (STOCK if "from_post_norms" in dataset else TIGHT)
    assert np.abs(dataset.logit_change).mean() > 1e-3


@pytest.mark.parametrize("ablation", ["resample", "zero"])
@pytest.mark.parametrize("name", representative(["olmo2", "olmo2-biased", "exaone4", "glm4"], "olmo2-biased"))
def test_norms_behind_sublayers_without_rounding(measure, wrapped, seeded, name, ablation):
    dataset, ids = measure(name, ablation=ablation), seeded(name)
    model = wrapped(name, exact=True).nn._module
    expected = oracle.reference(model, ids, partners=families.derangement(len(ids)), ablation=ablation)
    agree(dataset, expected)
    assert np.abs(dataset.closure).max() < TIGHT
    assert np.abs(dataset.from_post_norms).mean() > 1e-3


@pytest.mark.parametrize("freeze", ["downstream", "all"])
@pytest.mark.parametrize("name", representative(["olmo2", "glm4", "gemma2", "lfm2", "jamba"], "jamba"))
def test_frozen_where_there_is_more_than_heads_and_mlps(measure, wrapped, seeded, name, freeze):
    dataset, ids = measure(name, exact=False, freeze=freeze), seeded(name)
    partners = families.derangement(len(ids))
    expected = oracle.reference(wrapped(name).nn._module, ids, partners=partners, freeze=freeze)
    agree(dataset, expected, STOCK)
    if freeze == "all":
        own = dataset.ablated_direct_effect - dataset.direct_effect
        assert np.abs((dataset.logit_change - own).sel(layer=expected["having"])).max() < STOCK
