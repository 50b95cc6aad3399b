"""The arithmetic of direct effects, in at least float32 whatever the model computes in.

Products of a direction with activations are multiply-and-sum: under autocast they stay in float32, in which directions
are, and activations need no wider copy. The few true matrix products switch autocast off.
"""

import torch


def widen(x):
    """`x` in float32, or as it is if it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def along(x, direction):
    """Dot product over the last dimension: [..., d] with [..., d] -> [...]."""
    return (widen(x) * direction.to(x.device)).sum(-1)


def product(a, b):
    """Matrix product in at least float32."""
    with torch.autocast(a.device.type, enabled=False):
        return widen(a) @ widen(b)


def total(tensors):
    """Their sum, on the device of the first; that one itself where there is no other."""
    first, *others = tensors
    return sum((x.to(first.device) for x in others), first)


def sent(x, device):
    """`x` on a device; from the CPU to a GPU through pinned memory, so that nothing waits for what that still does."""
    if x.is_cuda or torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def among(indices, device):
    """As an index: a slice where they follow one another, which copies nothing, else a tensor on the device."""
    first = indices[0]
    if indices == list(range(first, first + len(indices))):
        return slice(first, first + len(indices))
    return sent(torch.tensor(indices), device)


def centre(x, plan):
    """C(x): minus the mean over the last dimension for LayerNorm, the identity for RMSNorm."""
    return x - x.mean(-1, keepdim=True) if plan["model"]["centred_norm"] else x


def values_in(out, plan):
    """The values within the value projection's output, as a view: [..., key-value heads, d_head].

    Values come last: of all that it gives, or of what it gives for each of these heads in turn.
    """
    width, count = plan["model"]["d_head"], plan["model"]["n_kv_heads"]
    if plan["model"]["places"]["value_layout"] == "interleaved":
        return out.unflatten(-1, (count, -1))[..., -width:]
    return out[..., -count * width :].unflatten(-1, (count, width))


def behind_norm(x, probed, clean, layer):
    """`x` [prompt, position, d] as a norm behind a layer's attention, if there is one, multiplies it in the clean run.

    It does the same to what the attention gives and, being diagonal, to a direction that is pulled back through it.
    """
    if layer not in probed["post_gain"]:
        return x
    gain = probed["post_gain"][layer] / clean["post_scale"][layer][..., None]
    return x.to(gain.device) * gain


def capped(logit, plan):
    """A logit as the model returns it, where it has a soft cap."""
    cap = plan["model"]["logit_cap"]
    return logit if cap is None else cap * torch.tanh(logit / cap)


def to_cpu(found):
    """A job's result, tensors by name and perhaps by layer, on the CPU."""
    return {name: _home(each) for name, each in found.items()}


def _home(x):
    return to_cpu(x) if isinstance(x, dict) else x.cpu() if isinstance(x, torch.Tensor) else x


def norm_scale(x, plan):
    """S = sqrt(mean(C(x)^2) + epsilon): what the final norm divides by. [..., d] -> [...]."""
    return (centre(widen(x), plan).square().mean(-1) + plan["model"]["norm_epsilon"]).sqrt()


def per_head(x, plan):
    """Split the input of the output projection into heads: [..., heads * d_head] -> [..., heads, d_head]."""
    return x.unflatten(-1, (plan["model"]["n_heads"], plan["model"]["d_head"]))
