"""Which case rides on which prompt in which pass, and where its numbers go."""

import torch

from selfrepair_nn.tracing.cases import entrance


def passes(cases, plan, tokens, wanted=None):
    """Share the work out among passes: one entrance each, and at most `tokens_per_pass` tokens (but at least one row).

    Args:
        tokens: ids [prompt, position].
        wanted: how many positions of each prompt are wanted for each case, [case, prompt]; None for all of them.
            Rows with none are left out, and rows of like length ride together.

    Returns a list of dicts: start, inside (the entrance); cases, a list of (index of the case, its prompts), and
        prompts of all rows, in the order of the rows; whole, whether every case rides on every prompt; tokens
        [row, position]; length, the number of positions.
    """
    n, length = tokens.shape
    found = []
    for first, group in _by_entrance(cases, plan):
        lengths = torch.full((len(group), n), length) if wanted is None else wanted[group]
        rows = lengths.flatten().sort(descending=True, stable=True)[1]
        rows = rows[lengths.flatten()[rows] > 0]
        whole = n if wanted is None else 1
        while len(rows):
            longest = int(lengths.flatten()[rows[0]])
            size = max(1, plan["tokens_per_pass"] // (longest * whole)) * whole
            found.append(_pass(first, rows[:size].sort()[0], group, tokens, longest))
            rows = rows[size:]
    return found


def _by_entrance(cases, plan):
    """Runs of cases, in order, that begin at the same place: [(entrance, indices)]."""
    groups = []
    for index, case in enumerate(cases):
        where = entrance(case, plan)
        if groups and groups[-1][0] == where:
            groups[-1][1].append(index)
        else:
            groups.append((where, [index]))
    return groups


def _pass(where, rows, group, tokens, longest):
    case, prompts = rows // len(tokens), rows % len(tokens)
    batch = [(group[i], prompts[case == i]) for i in case.unique().tolist()]
    return {
        "start": where[0],
        "inside": where[1],
        "cases": batch,
        "prompts": prompts,
        "whole": all(len(own) == len(tokens) for _, own in batch),
        "tokens": tokens[prompts.to(tokens.device), :longest],
        "length": longest,
    }


def gathered(found, prompts, positions, cases):
    """The results of all passes as [case, prompt, position, …], NaN (or -1) where nothing was wanted.

    `found` is a list of (pass, {name: [row, position, …]}, {name: [token, …]}, places of these tokens); the latter
    come back as [token, …], in the order of case, prompt and position.
    """
    out = {}
    for batch, results, _, _ in found:
        case = torch.cat([torch.full((len(p),), i) for i, p in batch["cases"]])
        for name, value in results.items():
            if name not in out:
                blank = float("nan") if value.is_floating_point() else -1
                shape = (cases, prompts, positions, *value.shape[2:])
                out[name] = torch.full(shape, blank, dtype=value.dtype, device=value.device)
            out[name][case, batch["prompts"], : value.shape[1]] = value
    order = torch.cat([places for *_, places in found]).argsort() if found and found[0][2] else None
    for name in found[0][2] if found else ():
        out[name] = torch.cat([few[name] for _, _, few, _ in found])[order]
    return out
