"""Equations 1 and 2 of the paper and Appendix B: what follows from the measured quantities, in one place."""

import numpy as np

TOLERANCE = {"float64": 1e-5, "float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}
"""How far from exact a model of a number format may be decomposed: a share of the logits' standard deviation.

In float64 too, for some models compute their norms in float32 whatever they are asked.
"""

CLOSURE = TOLERANCE | {"float64": 1e-8}
"""The largest |closure| that rounding explains, as such a share: both sides of it are computed from the same pass."""


PARTS = ("from_components", "from_heads", "from_mlps", "from_mixers", "from_post_norms")
"""The parts of the self-repair that are measured, as far as there are such; from_norm follows."""


def complete(measured: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add self_repair, its parts and its closure to what a job measured, in float64.

    Takes logit, target_constant, norm_scale [prompt, position] and direct_effect, ablated_direct_effect, logit_change,
    from_heads, from_mlps, ablated_norm_scale [case, prompt, position], and the other PARTS that the model has; all in
    logits but the scales. With r = S/S' and R = logit - k:

        self_repair = logit_change - (DE' - DE)                      Equation 1
        R' = R + (DE' - DE) + from_heads + from_mlps + …             summed ablated direct effects
        from_norm = (r - 1) R' = norm_on_existing + norm_on_change   (r - 1) R and (r - 1)(R' - R), Appendix B
        closure = self_repair - (from_heads + from_mlps + … + from_norm)   Equation 2: zero if nothing was missed

    Where the other components are one sum, from_components, the rest of the final residual stream, there is no closure:
    nothing could be missed.

    What a reinforced head's run inserts into the residual stream counts with the head's own change.
    """
    wide = {name: np.asarray(value, dtype=np.float64) for name, value in measured.items()}
    own = wide["ablated_direct_effect"] - wide["direct_effect"] + wide.get("inserted_direct_effect", 0)
    others = sum(wide[name] for name in PARTS if name in wide)
    change = own + others
    stretch = wide["norm_scale"] / wide["ablated_norm_scale"] - 1
    self_repair = wide["logit_change"] - own
    on_existing = stretch * (wide["logit"] - wide["target_constant"])
    on_change = stretch * change
    from_norm = on_existing + on_change
    found = measured | {
        "self_repair": self_repair,
        "from_norm": from_norm,
        "norm_on_existing": on_existing,
        "norm_on_change": on_change,
    }
    if "from_components" in measured:
        return found
    return found | {"closure": self_repair - (others + from_norm)}
