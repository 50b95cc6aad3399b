"""Which case runs on which prompt in which pass, and where its numbers go."""

import torch

from selfrepair_nn.tracing.cases import begins
from selfrepair_nn.tracing.objects import Bundle


class Batch(Bundle):
    """What one ablated pass computes: some cases, each on some prompts, a row each.

    `start` is the place where all of them begin; `cases` lists (index of the case, or the case prepared, its prompts);
    `prompts` are those of all rows, in order; `whole` says whether every case has every prompt; `tokens`
    [row, position] are cut to `length`.
    """

    start: tuple
    cases: list
    prompts: torch.Tensor
    whole: bool
    tokens: torch.Tensor
    length: int

    def each(self):
        """(rows of the case, the case, its prompts) of each case."""
        first = 0
        for case, prompts in self.cases:
            yield slice(first, first + len(prompts)), case, prompts
            first += len(prompts)

    def prepared(self, ready):
        """The same with each case, by its index, prepared."""
        cases = [(ready[index], prompts) for index, prompts in self.cases]
        return Batch(**vars(self) | {"cases": cases})

    def of(self, x, prompts=None):
        """What belongs to each row (or to a row for each of `prompts`), from x [prompt, position, …]."""
        if self.whole and prompts is not None:
            return x[:, : self.length]
        wanted = self.prompts if prompts is None else prompts
        return x[:, : self.length].index_select(0, wanted.to(x.device))

    def against(self, operation, x, kept):
        """operation(x, what belongs to each row of `kept`) for x [row, position, …] and kept [prompt, position, …].

        The same as with `of`, without its copy where every case has every prompt.
        """
        kept = kept.to(x.device)
        if self.whole:
            return operation(x.unflatten(0, (-1, len(kept))), kept[:, : self.length]).flatten(0, 1)
        return operation(x, self.of(kept))


def batches(cases, plan, tokens, wanted=None):
    """Share the work out among passes: one start each, and at most `tokens_per_pass` tokens (but at least one row).

    Args:
        tokens: ids [prompt, position].
        wanted: how many positions of each prompt are wanted for each case, [case, prompt]; None for all of them.
            Rows with none are left out, and rows of like length go together.

    Returns a list of Batch.
    """
    n, length = tokens.shape
    found = []
    for start, group in _by_start(cases, plan):
        lengths = torch.full((len(group), n), length) if wanted is None else wanted[group]
        rows = lengths.flatten().sort(descending=True, stable=True)[1]
        rows = rows[lengths.flatten()[rows] > 0]
        whole = n if wanted is None else 1
        while len(rows):
            longest = int(lengths.flatten()[rows[0]])
            size = max(1, plan["tokens_per_pass"] // (longest * whole)) * whole
            found.append(_batch(start, rows[:size].sort()[0], group, tokens, longest))
            rows = rows[size:]
    return found


def _by_start(cases, plan):
    """Runs of cases, in order, that begin at the same place: [(place, indices)]."""
    groups = []
    for index, case in enumerate(cases):
        start = begins(case, plan)
        if groups and groups[-1][0] == start:
            groups[-1][1].append(index)
        else:
            groups.append((start, [index]))
    return groups


def _batch(start, rows, group, tokens, longest):
    case, prompts = rows // len(tokens), rows % len(tokens)
    own = [(group[i], prompts[case == i]) for i in case.unique().tolist()]
    whole = all(len(of_case) == len(tokens) for _, of_case in own)
    return Batch(start, own, prompts, whole, tokens[prompts.to(tokens.device), :longest], longest)


def gathered(found, prompts, positions, cases):
    """The results of all passes as [case, prompt, position, …], NaN (or -1) where nothing was wanted.

    `found` is a list of (Batch, {name: [row, position, …]}, {name: [token, …]}, places of these tokens); the latter
    come back as [token, …], in the order of case, prompt and position.
    """
    out = {}
    for batch, results, _, _ in found:
        case = torch.cat([torch.full((len(p),), i) for i, p in batch.cases])
        for name, value in results.items():
            if name not in out:
                blank = float("nan") if value.is_floating_point() else -1
                shape = (cases, prompts, positions, *value.shape[2:])
                out[name] = torch.full(shape, blank, dtype=value.dtype, device=value.device)
            out[name][case, batch.prompts, : value.shape[1]] = value
    order = torch.cat([places for *_, places in found]).argsort() if found and found[0][2] else None
    for name in found[0][2] if found else ():
        out[name] = torch.cat([few[name] for _, _, few, _ in found])[order]
    return out
