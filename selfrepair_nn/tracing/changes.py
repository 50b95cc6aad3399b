"""What a pass changed of ⟨x, d_t⟩, activation by activation: read with as little traffic as the device allows."""

import torch


def compare(x, what, layer, block, batch, changes):
    """`effects_of_change`; where words are asked for the changes of tokens that are kept go to `changes`."""
    if block.plan["words"]:
        changes["watched"][what, layer] = block.plan["words"].watched(x, what, layer, block, batch)
    return effects_of_change(x, what, layer, block, batch)


def effects_of_change(x, what, layer, block, batch):
    """⟨x − clean, d_t⟩ of what a pass gives of an activation, x [row, position, d].

    Returns [row, position, head] of "z", of which each head has its part; [row, position, 1] of others.
    """
    kept = block.clean[what][layer]
    direction, groups = block.probed["given_direction"], 1
    if what == "z":
        direction, groups = block.probed["pullback"][layer], block.plan["model"]["n_heads"]
    if batch.whole and batch.length == kept.shape[1] and dots_pay(x):
        return _by_dots(x, what, layer, block, direction, groups).reshape(*x.shape[:2], groups)
    effects = batch.against(torch.mul, batch.against(torch.sub, x, kept), direction)
    return effects.unflatten(-1, (groups, -1)).sum(-1)


def _by_dots(x, what, layer, block, direction, groups):
    width = x.shape[-1] // groups
    shared = layer if what == "z" else None  # the directions of all others are the same in every layer
    parts = block.once(
        ("parts", shared, x.device), lambda: in_parts(direction.to(x.device).reshape(-1, width), x.dtype)
    )
    rows, clean = (each.reshape(-1, len(parts), width) for each in (x, block.clean[what][layer]))
    if x.dtype == torch.float32:  # the difference first: the product of each would round more than the change is
        return dots(rows - clean, parts)
    return dots(rows, parts) - block.once(("clean", what, layer), lambda: dots(clean, parts))


def dots_pay(x):
    """Whether `dots` is exact and fast for such a tensor: on a GPU, and not where float32 products are made coarser."""
    exact = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    wide = x.dtype == torch.bfloat16 and "out_dtype" in (torch.bmm.__doc__ or "")
    return x.is_cuda and (exact or wide)


def in_parts(direction, dtype):
    """A direction [place, d] as a sum of parts in a model's dtype, of which no rounding is left: [place, part, d]."""
    if dtype == torch.float32:
        return direction[:, None]
    high = direction.to(dtype)
    middle = (direction - high).to(dtype)
    return torch.stack([high, middle, (direction - high.float() - middle).to(dtype)], 1)


def dots(x, parts):
    """Dot products in float32 of x [case, place, d] with directions `in_parts`: [case, place].

    As one batched product x is read once, in its own dtype, and no wider copy of it is made.
    """
    x = x.permute(1, 2, 0)
    if x.dtype == torch.float32:
        found = torch.bmm(parts, x)
    else:
        found = torch.bmm(parts, x, out_dtype=torch.float32) if x.is_cuda else torch.bmm(parts.float(), x.float())
    return found.sum(1).T
