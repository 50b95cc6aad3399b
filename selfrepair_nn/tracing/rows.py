"""Which case runs on which prompt in which pass, and where its numbers go.

Of `batches` (told here, for the text of a function travels with each request, a module's does not):

Args:
    tokens: ids [prompt, position].
    room: a `memory.Room`. Where the last batch did not fit, its rows come again, in the end one by one.
    device: where the batches' tokens and indices are to lie.
    wanted: how many positions of each prompt are wanted for each case, [case, prompt]; None for all of them.
        Rows with none are left out, and rows of like length go together.

Of a `Batch`: `start` is the place where all of its cases begin; `cases` lists (index of the case, or the case prepared,
its prompts); `prompts` are those of all rows, in order; `whole` says whether every case has every prompt; `tokens`
[row, position] are cut to `length`. Of cases that are prepared, `replaced` says what takes a site's place in the pass:
{(kind of activation, layer): [(rows of the case, its prompts, site, new value)]}.
"""

import torch

from selfrepair_nn.tracing.cases import begins
from selfrepair_nn.tracing.objects import Bundle
from selfrepair_nn.tracing.readouts import sent


class Batch(Bundle):
    """What one ablated pass computes: some cases, each on some prompts, a row each. More is told at the top."""

    start: tuple
    cases: list
    prompts: torch.Tensor
    whole: bool
    tokens: torch.Tensor
    length: int
    replaced: dict

    def each(self):
        """(rows of the case, the case, its prompts) of each case."""
        first = 0
        for case, prompts in self.cases:
            yield slice(first, first + len(prompts)), case, prompts
            first += len(prompts)

    @property
    def numbers(self):
        """The index of each row's case, where the cases are not prepared yet."""
        counts = torch.tensor([len(prompts) for _, prompts in self.cases])
        return sent(torch.tensor([i for i, _ in self.cases]).repeat_interleave(counts), self.prompts.device)

    def prepared(self, ready):
        """The same with each case, by its index, prepared."""
        cases = [(ready[index], prompts) for index, prompts in self.cases]
        found = Batch(**vars(self) | {"cases": cases, "replaced": {}})
        for rows, case, prompts in found.each():
            for site, edit in case.edits.items():
                if edit.new is not None:
                    found.replaced.setdefault((site.kept, site.layer), []).append((rows, prompts, site, edit.new))
        return found

    def in_rows(self, of_case):
        """What `of_case` gives of each case, [prompt, position, …], in its rows: [row, position, …]."""
        return torch.cat([self.of(of_case(case), prompts) for case, prompts in self.cases])

    def of(self, x, prompts=None):
        """What belongs to each row (or to a row for each of `prompts`), from x [prompt, position, …]."""
        if self.whole and prompts is not None:
            return x[:, : self.length]
        wanted = self.prompts if prompts is None else prompts
        return x[:, : self.length].index_select(0, sent(wanted, x.device))

    def against(self, operation, x, kept):
        """operation(x, what belongs to each row of `kept`) for x [row, position, …] and kept [prompt, position, …].

        The same as with `of`, without its copy where every case has every prompt.
        """
        kept = kept.to(x.device)
        if self.whole:
            return operation(x.unflatten(0, (-1, len(kept))), kept[:, : self.length]).flatten(0, 1)
        return operation(x, self.of(kept))


def batches(cases, plan, tokens, room, device, wanted=None):
    """One Batch after the other: one start each, and as many tokens as there is room for, or one case."""
    n, length = tokens.shape
    for start, group in _by_start(cases, plan):
        lengths = torch.full((len(group), n), length) if wanted is None else wanted[group]
        rows = lengths.flatten().sort(descending=True, stable=True)[1]
        rows = rows[lengths.flatten()[rows] > 0]
        while len(rows):
            longest = int(lengths.flatten()[rows[0]])
            whole = n if wanted is None and (room.tokens >= n * longest or not room.refused) else 1
            size = max(1, room.tokens // (longest * whole)) * whole
            batch = _batch(start, rows[:size].sort()[0], group, tokens, longest, device)
            yield batch
            if room.fitted >= batch.tokens.numel():
                rows = rows[size:]


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


def _batch(start, rows, group, tokens, longest, device):
    case, prompts = rows // len(tokens), rows % len(tokens)
    indices, counts = case.unique(return_counts=True)
    whole, ids = bool((counts == len(tokens)).all()), tokens[prompts.to(tokens.device), :longest]
    prompts = sent(prompts, device)
    own = [(group[i], of_case) for i, of_case in zip(indices.tolist(), prompts.split(counts.tolist()), strict=True)]
    return Batch(start, own, prompts, whole, sent(ids, device), longest, {})


def gathered(found, prompts, positions, cases):
    """The results of all passes as [case, prompt, position, …], NaN (or -1) where nothing was wanted.

    `found` is a list of (Batch, {name: [row, position, …]}, {name: [token, …]}, places of these tokens); the latter
    come back as [token, …], in the order of case, prompt and position.
    """
    rows = sum(len(batch.prompts) for batch, *_ in found)
    if rows == cases * prompts and all(batch.length > positions for batch, *_ in found):
        out = {name: torch.cat([results[name] for _, results, *_ in found]) for name in found[0][1]}
        out = {name: x.unflatten(0, (cases, prompts)) for name, x in out.items()}
    else:
        out = _scattered(found, (cases, prompts, positions))
    order = torch.cat([places for *_, places in found]).argsort() if found[0][2] else None
    for name in found[0][2]:
        out[name] = torch.cat([few[name] for _, _, few, _ in found])[order]
    return out


def _scattered(found, sizes):
    """The results of passes that have only some rows, each in its place."""
    out = {}
    for batch, results, _, _ in found:
        for name, value in results.items():
            if name not in out:
                blank = float("nan") if value.is_floating_point() else -1
                out[name] = value.new_full((*sizes, *value.shape[2:]), blank)
            out[name][batch.numbers, batch.prompts, : value.shape[1]] = value
    return out
