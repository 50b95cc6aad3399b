"""The smallest job there is: one token through the model, to see that it answers and what it computes in."""

import torch
from nnsight import save

from selfrepair_nn.tracing.places import place


def first_job(model, arrays, plan, tick=None, known=None):
    """The final norm's input for one token, in the dtype of the model: {"residual": [d_model]}."""
    nothing = torch.zeros(0, dtype=torch.long)
    with torch.no_grad(), model.trace(arrays["tokens"][:1, :1], use_cache=False, logits_to_keep=nothing):
        found = save([place(model, plan, "final_norm").input])
    return {"residual": found[0][0, 0].clone().cpu()}
