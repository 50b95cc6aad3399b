"""Prompts made for one question: names to be moved, tokens that repeat, texts with one token exchanged for another."""

from collections import Counter
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from selfrepair_nn.errors import UsageError
from selfrepair_nn.padding import within
from selfrepair_nn.prompts import Prompts, shuffled, special_ids
from selfrepair_nn.values import require_sane

NAMES = (
    *("Mary", "John", "Alice", "Henry", "Emma", "Jane", "David", "Anne", "Thomas", "Edward", "Elizabeth"),
    *("Edmund", "Harriet", "Fanny", "Tom", "James", "Dan", "Sarah", "Paul", "Mark", "Anna", "Peter"),
    *("Jack", "Kate", "Lucy", "George", "William", "Robert", "Charles", "Susan", "Martin", "Adam"),
)
PLACES = ("house", "city", "field", "town", "room")
THINGS = ("book", "letter", "drink", "hat", "sword", "horse")
TEMPLATES = (
    "When {first} and {second} went to the {place}, {subject} gave a {thing} to",
    "As {first} and {second} came from the {place}, {subject} brought a {thing} to",
    "When {first} and {second} met in the {place}, {subject} sent a {thing} to",
    "As {first} and {second} sat in the {place}, {subject} passed a {thing} to",
)
"""Of as many words and signs each, and of words that are one token in most vocabularies: equally long."""

FEWEST_NAMES = 4
MOST = 100_000
"""Prompts of a task: with more, the means are known far better than anything else."""


class Sentence(NamedTuple):
    """One prompt of the task, in words: the text up to the last name, that name, and the other one."""

    text: str
    indirect_object: str
    subject: str


def ioi_prompts(tokenizer: Any, count: int = 64, seed: int = 0, bos: str = "auto") -> Prompts:
    """Indirect object identification: two names, then one of them gives something to ... the other (section 5.3.1).

        When Mary and John went to the garden, John gave a book to Mary

    The last token is the indirect object: what the model should say at the last position, the only one that counts.
    There `other` is the subject, so that the target is the difference of the two names' logits. At earlier positions
    nothing is asked: `other` is the next token itself, and every effect on it is 0.

    Each pair of names, with a place and a thing that are drawn, in each template in turn, makes four prompts: either
    name comes first (ABBA, BABA) and either is the subject. Only names that are one token after a space are used. All
    rows are equally long: of the lengths that the tokenizer makes, the most frequent is kept. `document` says which
    four belong together; `source` how many were drawn and kept, and the names to draw from.

    Args:
        count: prompts to draw, a multiple of 4; fewer are kept where lengths differ.

    Raises:
        UsageError: no tokenizer, a count that is none, or too few names that are one token.
    """
    if not isinstance(count, int) or count < 4 or count % 4:
        raise UsageError(f"{count!r} prompts: give a multiple of 4, for each pair of names makes four")
    require_sane("count", count, MOST)
    first, _ = special_ids(tokenizer, bos, "the task")
    names = _names(tokenizer)
    sentences = _sentences(count, list(names), np.random.PCG64(seed))
    begin = [] if first is None else [first]
    rows = [begin + _ids(tokenizer, f"{s.text} {s.indirect_object}") for s in sentences]
    length = Counter(map(len, rows)).most_common(1)[0][0]
    kept = np.array([n for n, row in enumerate(rows) if len(row) == length])
    subjects = np.array([names[sentences[n].subject] for n in kept])
    source = {"kind": "task", "name": "ioi", "seed": seed, "bos_id": first, "length": length}
    source |= {"drawn": count, "kept": len(kept), "names": list(names)}
    source |= {"criterion": {"says": "prefers the indirect object"}}
    tokens = np.array([rows[n] for n in kept])
    other = np.concatenate([tokens[:, 1:-1], subjects[:, None]], axis=1)
    return Prompts(tokens, kept // 4, source, other=other, counted=_from(length - 2, *other.shape))


def _from(first: int, prompts: int, positions: int) -> np.ndarray:
    """bool [prompt, position], True from a position on."""
    return np.tile(np.arange(positions) >= first, (prompts, 1))


def _names(tokenizer: Any) -> dict[str, int]:
    """The names that are one token in the middle of a text, with their ids."""
    before, found = _ids(tokenizer, "to"), {}
    for name in NAMES:
        ids = _ids(tokenizer, f"to {name}")
        if ids[:-1] == before:
            found[name] = ids[-1]
    if len(found) < FEWEST_NAMES:
        raise UsageError(
            f"this tokenizer writes {len(found)} of {len(NAMES)} names as one token, and the task needs "
            f"{FEWEST_NAMES}: use a model with a larger vocabulary"
        )
    return found


def _sentences(count: int, names: list[str], bits: np.random.PCG64) -> list[Sentence]:
    """Four for each pair of names: either comes first, and either is the subject. Pairs repeat when all have been."""
    pairs, found = list(combinations(names, 2)), []
    order = shuffled(bits, len(pairs))
    for number in range(count // 4):
        a, b = pairs[order[number % len(pairs)]]
        template = TEMPLATES[number % len(TEMPLATES)]
        place, thing = (words[shuffled(bits, len(words))[0]] for words in (PLACES, THINGS))
        for first, second in ((a, b), (b, a)):
            for indirect_object, subject in ((a, b), (b, a)):
                text = template.format(first=first, second=second, subject=subject, place=place, thing=thing)
                found.append(Sentence(text, indirect_object, subject))
    return found


def repeated_prompts(
    tokenizer: Any, vocab_size: int, count: int = 8, period: int = 24, seed: int = 0, bos: str = "auto"
) -> Prompts:
    """Random tokens, and the same again: what comes next in the second half can only be known from the first.

    Each row is BOS where `bos` says so, `period` tokens drawn without repetition from the whole vocabulary but the
    special tokens, and the same tokens once more. `tokenizer` may be None: then there is no BOS, and any id is drawn.
    What counts is the second half from its first token on: who has read that knows what follows.

    Raises:
        UsageError: a period below 3, or of more tokens than there are; a count below 1.
    """
    first = None if tokenizer is None else special_ids(tokenizer, bos, "a task")[0]
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    known = vocab_size if tokenizer is None else min(vocab_size, len(tokenizer))
    drawn_from = np.array([i for i in range(known) if i not in special], np.int64)
    if not 3 <= period <= drawn_from.size:
        raise UsageError(f"period {period!r}: give 3 to {drawn_from.size}, the tokens that can be drawn")
    if not isinstance(count, int) or count < 1:
        raise UsageError(f"{count!r} prompts: give 1 or more")
    require_sane("count", count, MOST)
    bits = np.random.PCG64(seed)
    halves = np.array([drawn_from[shuffled(bits, drawn_from.size)[:period]] for _ in range(count)])
    begins = np.full((count, 0 if first is None else 1), first or 0)
    tokens = np.concatenate([begins, halves, halves], axis=1)
    source = {"kind": "task", "name": "repeated", "seed": seed, "bos_id": first, "period": period}
    source |= {"criterion": {"says": "favours the repeated tokens", "back": period}}
    counted = _from(tokens.shape[1] - period, count, tokens.shape[1] - 1)
    return Prompts(tokens, np.arange(count), source, counted=counted)


def edited_prompts(prompts: Prompts, tokenizer: Any, old: str, new: str) -> Prompts:
    """The same prompts, with a counterfactual of each in which every token `old` is the token `new`.

    What counts are the tokens, of those that counted before, from a row's first exchanged one on: the earlier ones
    cannot differ from their counterfactual's. Rows in which that is none are dropped; `source` says how many, and how
    many tokens of the others are exchanged.

    Raises:
        UsageError: `old` or `new` is not one token, both are the same one, or no row has `old` before its last token.
    """
    if tokenizer is None:
        raise UsageError("an edit of tokens needs the model's tokenizer")
    before, after = (_single(tokenizer, text) for text in (old, new))
    if before == after:
        raise UsageError(f"{old!r} for {new!r} changes nothing: give two different tokens")
    here = (prompts.tokens == before) & within(prompts.ends, prompts.length)
    counted = np.logical_or.accumulate(here[:, :-1], axis=1) & prompts.counts
    rows = np.any(counted, axis=1)
    if not rows.any():
        raise UsageError(
            f"no prompt has the token {old!r} before a token that counts: exchange another, or give other prompts"
        )
    edit = {"old": old, "new": new, "old_id": before, "new_id": after}
    edit |= {"exchanged": int(here[rows].sum()), "rows_dropped": int((~rows).sum())}
    criterion = {"says": "predicts the text"}
    counterfactual = np.where(here, after, prompts.tokens)
    edited = replace(prompts, counterfactual=counterfactual, counted=counted).taken(rows)
    return replace(edited, source=prompts.source | {"edit": edit, "criterion": criterion})


def _single(tokenizer: Any, text: str) -> int:
    ids = _ids(tokenizer, text)
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids) or "nothing"
        raise UsageError(f"{text!r} is not one token of this tokenizer but {pieces}: give another")
    return ids[0]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
