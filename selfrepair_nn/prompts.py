"""Text to rows of token ids: where prompts come from, how they are packed, which prompt lends to which."""

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import islice

import numpy as np

from selfrepair_nn.corpora import COLUMN, SAMPLE, SPLIT, is_texts, open_corpus, require_plain, require_text
from selfrepair_nn.errors import UsageError, one_line
from selfrepair_nn.padding import ALIKE, alike, filled, padded, within
from selfrepair_nn.values import Declared, brief
from selfrepair_nn.values import ids as as_ids

DEFAULT_LENGTH = 128
DEFAULT_TOKENS = 100_000
SAMPLE_TOKENS = 16_384
TEXT_LENGTH = 1024
BOS = ("auto", "always", "never")

ROWS_ARE = {
    "packed": "documents joined, and cut into rows of one length",
    "texts": "each document by itself: no other's tokens in its row, filled up on the right",
}
"""What a row of text is."""

PARTS = ("tokens", "document", "counterfactual", "other", "counted", "lengths")
"""What there is for each prompt."""

_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class Prompts(metaclass=Declared):
    """Rows of token ids and where they came from.

    Attributes:
        tokens: int64 [prompt, position], at least one row of at least two tokens.
        document: int64 [prompt], index in the source of the document in which the row starts.
        source: provenance that `json.dumps` accepts.
        counterfactual: int64 [prompt, position], a minimally different text for each row: what
            "counterfactual" ablation reads from.
        other: int64 [prompt, position], the token whose logit is subtracted from that of the next token; without
            the last position. With it the target is the difference of the two.
        counted: bool [prompt, position], which tokens are asked about, and so all that a statistic, a summary or a
            figure is over; without the last position. None is all of them.
        lengths: int64 [prompt], how many tokens of each row are its own; what stands behind them is filler, which never
            counts and for which the row's last token is put. None is all of them.

    Raises:
        UsageError: a shape or a type that does not fit, or no token that counts.
    """

    tokens: np.ndarray
    document: np.ndarray
    source: dict
    counterfactual: np.ndarray | None = None
    other: np.ndarray | None = None
    counted: np.ndarray | None = None
    lengths: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "document", "counterfactual", "other", "lengths"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _whole_numbers(name, getattr(self, name)))
        if not isinstance(self.source, Mapping):
            raise UsageError(f"source is a dict of where the prompts come from, not {brief(self.source)}")
        _check_rows(self.tokens, self.source.get("name", "tokens"))
        if self.document.shape != (self.n,):
            raise UsageError(
                f"document has shape {self.document.shape}: give one index for each of {self.n} rows"
            )
        for name, shape in (("counterfactual", self.tokens.shape), ("other", (self.n, self.length - 1))):
            ids = getattr(self, name)
            if ids is not None and ids.shape != shape:
                raise UsageError(f"{name} has shape {ids.shape}: give a token for each of {shape}")
        if self.counted is not None:
            _check_counted(self.counted, (self.n, self.length - 1))
        if self.lengths is not None:
            self._fill(self.lengths)

    def _fill(self, lengths: np.ndarray) -> None:
        """Put ids that a model reads where filler is; forget lengths that are those of the rows."""
        _check_lengths(lengths, self.n, self.length)
        for name, less in (("tokens", 0), ("counterfactual", 0), ("other", 1)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, filled(getattr(self, name), lengths - less))
        if (lengths == self.length).all():
            object.__setattr__(self, "lengths", None)
        elif not self.counts.any():
            raise UsageError("counted is True in the filler alone, behind each row's own tokens: name some of these")

    def taken(self, rows: np.ndarray | slice) -> "Prompts":
        """Some of the rows, in this order."""
        return replace(self, **{p: getattr(self, p)[rows] for p in PARTS if getattr(self, p) is not None})

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Number of tokens of each prompt."""
        return self.tokens.shape[1]

    @property
    def described(self) -> str:
        """How many rows of how many tokens these are, and how much of them is filler."""
        if self.lengths is None:
            return f"{self.n} of {self.length} tokens"
        filler = 1 - self.lengths.sum() / self.tokens.size
        return f"{self.n} of {self.lengths.min()} to {self.length} tokens ({filler:.0%} of the rows is filler)"

    @property
    def all_count(self) -> bool:
        """Whether every token that has a next one counts."""
        return self.counted is None or bool((self.counts == self.asked_of).all())

    @property
    def asked_of(self) -> np.ndarray:
        """Which tokens have a next one: bool [prompt, position], all but filler and what stands before that."""
        return within(self.ends - 1, self.length - 1)

    @property
    def ends(self) -> np.ndarray:
        """How many tokens of each row are its own: [prompt]."""
        return np.full(self.n, self.length) if self.lengths is None else self.lengths

    @property
    def counts(self) -> np.ndarray:
        """Which tokens count: bool [prompt, position], those with a next token."""
        return self.asked_of if self.counted is None else self.counted & self.asked_of

    @cached_property
    def sha256(self) -> str:
        """Hash of the shape and the token ids, as little-endian int64; then of counterfactual and other if given.

        Then of what counts, as bytes 0 and 1, where that is not every token; then of lengths that are not the row's.
        """
        digest = sha256(np.array(self.tokens.shape, dtype="<i8").tobytes())
        for ids in (self.tokens, self.counterfactual, self.other):
            if ids is not None:
                digest.update(ids.astype("<i8").tobytes())
        if self.counted is not None and not self.all_count:
            digest.update(self.counts.tobytes())
        if self.lengths is not None:
            digest.update(self.lengths.astype("<i8").tobytes())
        return digest.hexdigest()

    def take(self, n: int) -> "Prompts":
        """The first `n` prompts, or all where there are fewer. Raises UsageError if `n` is below 1."""
        _check_whole(n, "number of prompts", 1)
        return self.taken(slice(n))


def load_prompts(
    source=None,
    tokenizer=None,
    *,
    tokens: int | None = None,
    length: int | None = None,
    bos: str = "auto",
    split: str = SPLIT,
    column: str = COLUMN,
    revision: str | None = None,
    vocab_size: int | None = None,
    max_length: int | None = None,
    rows_are: str = "packed",
) -> Prompts:
    r"""Rows of `length` tokens from ready ids, a text, or a dataset.

    Token ids (an array or a `.npy` file) are used exactly as they are. Text is tokenised document by
    document, without the tokenizer's own special tokens, and joined with its EOS; the stream is cut into
    rows, each beginning with BOS where `bos` says so, and the unfinished last row is dropped. With `rows_are` "texts"
    each document is a row of its own instead, beginning with BOS likewise: cut where it is longer than `length`, left
    out where it has fewer than 2 tokens, and filled up on the right where it is shorter (`Prompts.lengths`).

    Args:
        source: None or "sample" for the shipped held-out text; an integer array or a `.npy` file [prompt, position]; a
            list of texts, each a document; rows of token ids of unequal length, as a tuple of tuples; `Prompts`, of
            which `tokens` and `length` take a part; a UTF-8 text file (a line holding only "\f" ends a document); a
            file of records (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`); a directory of data files that `datasets`
            can load; a dataset on the Hugging Face Hub, streamed: "owner/name" or "owner/name:configuration". A file
            may be gzipped (`.gz`). What exists on disk comes before the Hub.
        tokenizer: a `transformers` tokenizer; not needed for token ids.
        tokens: number of tokens wanted, BOS included: at most `tokens // length` rows, fewer where the
            source ends. None is everything there is, but 100,000 of a dataset. Where rows are texts, so many together,
            at most, filler left out; of one text at least.
        length: tokens in a row; None is 128, where rows are texts at most 1024, or `max_length` where that is less. For
            token ids, None is their own length, and a smaller number truncates.
        bos: "auto" begins rows with BOS if the tokenizer has one, "always" insists, "never" does not. Where
            the text of a row already begins with BOS, none is added.
        split: split of a dataset.
        column: column of a dataset or of records that holds the text.
        revision: branch, tag or commit of a dataset; the commit it resolves to is recorded.
        vocab_size: every id must be below it.
        max_length: longest row that the model can read.
        rows_are: "packed" or "texts"; token ids are rows as they are.

    Raises:
        UsageError: the source, or what is asked of it, does not exist or does not fit; a row that no tokenizer
            reads, such as half a surrogate pair, is named, and nothing is run without it.
        SelfRepairError: a dataset cannot be reached or read.
    """
    for name, choice, valid in (("bos", bos, BOS), ("rows_are", rows_are, ROWS_ARE)):
        if choice not in valid:
            raise UsageError(f"{name} {choice!r} is not one of {', '.join(valid)}")
    for name, value, least in (("tokens", tokens, 1), ("length", length, 2)):
        if value is not None:
            _check_whole(value, name, least)
    if isinstance(source, Prompts):
        prompts = _from_prompts(source, tokens, length, bos, vocab_size, max_length)
    elif _is_ready(source):
        require_plain(_named(source), split, column, revision)
        prompts = _from_ids(source, tokens, length, bos, vocab_size, max_length)
    else:
        usual = TEXT_LENGTH if rows_are == "texts" else DEFAULT_LENGTH
        length = min(usual, max_length or usual) if length is None else length
        _check_length(length, None if rows_are == "texts" else tokens, max_length)
        first, joint = special_ids(tokenizer, bos, source)
        corpus = open_corpus(source, split, column, revision)
        if rows_are == "texts":
            prompts = _from_texts(corpus, tokenizer, tokens, length, first)
        else:
            prompts = _from_text(corpus, tokenizer, tokens, length, first, joint)
        _check_ids(prompts.tokens, vocab_size, prompts.source["name"])
    return prompts


def text_prompts(structure, tokenizer, options) -> Prompts:
    """The prompts that a run's options ask for, for a model of this structure: what a recipe without its own takes.

    Arguments are those of a recipe's `prompts`. Errors as in `load_prompts`.
    """
    sample = isinstance(options.prompts, str) and options.prompts == SAMPLE
    return load_prompts(
        options.prompts,
        tokenizer,
        tokens=options.tokens or (SAMPLE_TOKENS if sample else None),
        length=options.length,
        bos=options.bos,
        split=options.dataset_split,
        column=options.column,
        revision=options.prompts_revision,
        vocab_size=structure.vocab_size,
        max_length=structure.max_length,
        rows_are=options.rows,
    )


def partners(n: int, seed: int) -> np.ndarray:
    """Which prompt's activations replace each prompt's under resample ablation: a random derangement.

    Uniform over all derangements of range(n), by rejection. Each permutation sorts raw PCG64 draws: NumPy
    keeps those the same in all versions and machines, and does not promise so of `Generator.permutation`.

    Returns:
        int64 [prompt], no entry equal to its index.

    Raises:
        UsageError: fewer than two prompts, or a negative seed.
    """
    return several_partners(n, seed, 1)[0]


def several_partners(n: int, seed: int, count: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """`count` different derangements of the same prompts, each uniform over those that are left: [resample, prompt].

    The first is that of `partners`, and fewer of the same seed are the first ones of more. Where `lengths` [prompt]
    differ, prompts lend to others of like length: a derangement is then one within each of `padding.alike`.

    Raises:
        UsageError: as in `partners`, or there are not so many.
    """
    _check_whole(seed, "seed", 0)
    if n < 2:
        raise UsageError(
            f"resample needs two prompts and there is {n}: use more tokens or texts (a text is a record of a file, or "
            "in a file of text what a line holding only a form feed ends), or ablate with mean or zero"
        )
    groups = [np.arange(n)] if lengths is None else alike(lengths)
    found = np.empty((count, n), np.int64)
    for number, group in enumerate(groups):
        own = seed if len(groups) == 1 else [seed, number]
        found[:, group] = group[_derangements(len(group), np.random.PCG64(own), count)]
    return found


def _derangements(n: int, bits: np.random.PCG64, count: int) -> np.ndarray:
    """Different ones, drawn one after the other: [number, prompt]."""
    if n < ALIKE and count > (there := derangements(n)):
        raise UsageError(
            f"resamples {count}: {n} prompts lend to one another in {there} way{'s' * (there > 1)} alone: use more "
            f"tokens, or at most {there}"
        )
    own = np.arange(n)
    found: dict[bytes, np.ndarray] = {}
    while len(found) < count:
        drawn = shuffled(bits, n)
        if not np.any(drawn == own):
            found.setdefault(drawn.tobytes(), drawn)
    return np.stack([*found.values()])


def derangements(n: int) -> int:
    """How many derangements of n things there are."""
    before, count = 1, 0  # of none and of one
    for size in range(2, n + 1):
        before, count = count, (size - 1) * (before + count)
    return count if n else before


def shuffled(bits: np.random.PCG64, n: int) -> np.ndarray:
    """The numbers 0 to n - 1 in random order: int64 [n]. The next n raw draws are used up."""
    return np.argsort(bits.random_raw(n), kind="stable").astype(np.int64)


def shuffled_targets(targets: np.ndarray, seed: int, prompt: int) -> np.ndarray:
    """Whose target stands for each position's of a prompt: a random permutation [position] from the seed and its place.

    No position has its own token, as far as the prompt holds enough others: what meets its own is exchanged.
    """
    bits = np.random.PCG64([seed, prompt])
    order = shuffled(bits, len(targets))
    for at in np.flatnonzero(targets[order] == targets):
        given = targets[order]
        fits = np.flatnonzero((given != targets[at]) & (targets != given[at]))
        if given[at] == targets[at] and fits.size:
            other = fits[int(bits.random_raw() % fits.size)]
            order[[at, other]] = order[[other, at]]
    return order


def load_partners(source, n: int) -> np.ndarray:
    """Partners chosen by the user, from an integer array or a `.npy` file: a permutation of range(n), or several.

    Entry i is the prompt whose activations replace prompt i's. A prompt may be its own partner: it is then
    replaced by itself, which is the null control for that prompt.

    Returns:
        int64 [prompt], or [resample, prompt] where there are several.

    Raises:
        UsageError: unreadable, not n integers each, not permutations, or the same one twice; the first bad entry is
            named.
    """
    name, entries = _read_ids(source, "partners")
    if entries.ndim == 2 and len(entries) > 1 and entries.shape[1] == n:
        rows = [_permutation(f"{name}, row {i}", row, n) for i, row in enumerate(entries)]
        for i, row in enumerate(rows):
            if (same := next((j for j in range(i) if (rows[j] == row).all()), None)) is not None:
                raise UsageError(f"{name}: rows {same} and {i} are the same partners: give each once")
        return np.stack(rows)
    if entries.shape != (n,):
        raise UsageError(
            f"{name} has shape {entries.shape}: give one partner for each of the {n} prompts, or several rows of them, "
            "[resample, prompt]"
        )
    return _permutation(name, entries, n)


def _permutation(name: str, entries: np.ndarray, n: int) -> np.ndarray:
    for bad, problem in (
        ((entries < 0) | (entries >= n), "is no prompt"),
        (~np.isin(np.arange(n), np.unique(entries, return_index=True)[1]), "is named before"),
    ):
        if bad.any():
            i = np.argmax(bad)
            raise UsageError(f"{name}: entry {i}, {entries[i]}, {problem}: name each of 0 to {n - 1} once")
    return entries.astype(np.int64)


def token_texts(tokenizer, tokens: np.ndarray) -> np.ndarray:
    """Each token id decoded alone, as str in an object array of the shape of `tokens`.

    Without a tokenizer (None) the text is the id in figures.
    """
    distinct, where = np.unique(tokens, return_inverse=True)
    texts = np.empty(distinct.size, dtype=object)
    for i, token in enumerate(distinct.tolist()):
        texts[i] = str(token) if tokenizer is None else _decode(tokenizer, token)
    return texts[where].reshape(np.shape(tokens))


def _decode(tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)


# Token ids, used as they are


def _is_ready(source) -> bool:
    if isinstance(source, (str, os.PathLike)):
        return str(source).lower().endswith(".npy")
    return source is not None and not is_texts(source)


def _named(source) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else "tokens"


def _from_ids(source, tokens, length, bos, vocab_size, max_length, what: str = "tokens") -> Prompts:
    if isinstance(source, tuple):
        return _from_prompts(_from_ragged(source), tokens, length, bos, vocab_size, max_length)
    name, ids = _read_ids(source, what)
    if bos == "always":
        raise UsageError(f"bos 'always': the token ids of {name} are used as they are; put BOS in them")
    _check_rows(ids, name)
    if length is not None and length > ids.shape[1]:
        raise UsageError(
            f"length {length} is beyond the rows of {name}: set length to {ids.shape[1]} or less"
        )
    ids = ids[:, :length]
    width = ids.shape[1]
    _check_length(width, tokens, max_length)
    ids = ids if tokens is None else ids[: tokens // width]
    _check_ids(ids, vocab_size, name)
    origin = {"kind": "npy" if isinstance(source, (str, os.PathLike)) else "array", "name": name}
    origin |= {"bos_id": None, "bos_added": False, "length": width}
    origin |= {"tokens_asked": None if tokens is None else int(tokens)}
    return Prompts(ids.astype(np.int64, order="C"), np.arange(len(ids), dtype=np.int64), origin)


def _from_ragged(rows) -> Prompts:
    """Rows of token ids of unequal length, filled up."""
    found = [_whole_numbers(f"row {number} of prompts", row) for number, row in enumerate(rows)]
    for number, row in enumerate(found):
        if row.ndim != 1 or row.size < 2:
            raise UsageError(f"row {number} of prompts has shape {row.shape}: give at least 2 token ids")
    tokens, lengths = padded(found)
    origin = {"kind": "array", "name": "tokens", "bos_id": None, "bos_added": False, "rows_are": "texts"}
    return Prompts(tokens, np.arange(len(tokens)), origin, lengths=lengths)


def _from_prompts(prompts: Prompts, tokens, length, bos, vocab_size, max_length) -> Prompts:
    """Prompts that are made already: so many of them, cut to a length, and what they say of these tokens."""
    name = prompts.source.get("name", "prompts")
    kept = _from_ids(prompts.tokens, tokens, length, bos, vocab_size, max_length, name)
    less = prompts.length - kept.length
    whole = {part: getattr(prompts, part) for part in PARTS if getattr(prompts, part) is not None}
    cut = {
        part: of[: kept.n, : of.shape[1] - less] if of.ndim == 2 else of[: kept.n]
        for part, of in whole.items()
    }
    if "lengths" in cut:
        cut["lengths"] = np.minimum(cut["lengths"], kept.length)
    if "counted" in cut and not cut["counted"].any():
        raise UsageError(
            f"of {name} {kept.n} rows of {kept.length} tokens hold none that counts: take more, or longer ones"
        )
    asked = {name: kept.source[name] for name in ("length", "tokens_asked")}
    found = replace(prompts, **cut, source=prompts.source | asked)
    require_readable(found, vocab_size, max_length)
    return found


def require_readable(prompts: Prompts, vocab_size: int | None, max_length: int | None) -> None:
    """UsageError unless a model of this vocabulary and context reads the prompts, and all that goes with them."""
    name = prompts.source.get("name", "prompts")
    for part in ("tokens", "counterfactual", "other"):
        ids = getattr(prompts, part)
        if ids is not None:
            _check_ids(ids, vocab_size, name)
    if max_length is not None and prompts.length > max_length:
        raise UsageError(
            f"{name} has prompts of {prompts.length} tokens, beyond the model: it reads {max_length} at most"
        )


def _read_ids(source, what: str) -> tuple[str, np.ndarray]:
    """Name and values of an integer array, given or in a `.npy` file; pickled objects are never read."""
    name, array = what, source
    if isinstance(source, (str, os.PathLike)):
        name = str(source)
        try:
            with open(os.path.expanduser(source), "rb") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError) as error:
            raise UsageError(f"cannot read {name} as a .npy array of integers: {one_line(error)}") from error
    array = np.asarray(array)
    if array.dtype.kind not in "iu":
        raise UsageError(f"{name} holds {array.dtype}: give integers, for example int64")
    return name, array


# Text, packed


def special_ids(tokenizer, bos: str, source) -> tuple[int | None, int | None]:
    """Ids that begin a row and that join two documents; None where there is none. Id 0 is a real token."""
    if tokenizer is None:
        name = "prompts" if is_texts(source) else source or SAMPLE
        raise UsageError(
            f"{name} is text: give a tokenizer with it, or a .npy file of token ids; where the model is a module, "
            "write model=sr.wrap(module, tokenizer)"
        )
    first = None if bos == "never" else getattr(tokenizer, "bos_token_id", None)
    if first is None and bos == "always":
        raise UsageError("bos 'always': the tokenizer has no BOS token; choose auto or never")
    return first, getattr(tokenizer, "eos_token_id", None)


def _from_text(corpus, tokenizer, tokens, length: int, first: int | None, joint: int | None) -> Prompts:
    documents, origin = corpus
    tokens = _wanted(tokens, origin)
    limit = None if tokens is None else max(1, tokens // length)
    with closing(documents):
        texts = _readable(documents, origin["name"])
        stream, starts, numbers = _stream(texts, tokenizer, joint, limit and limit * length)
    rows, begins, end = _pack(stream, length, first, limit)
    if not begins:
        raise _too_short(origin["name"], stream, length, first)
    origin |= _read_with(tokenizer, first, tokens) | {"separator_id": joint, "length": int(length)}
    origin |= {"documents": int(numbers[_holder(starts, end - 1)]) + 1}
    return Prompts(rows, numbers[_holder(starts, begins)], origin)


def _wanted(tokens: int | None, origin: dict) -> int | None:
    return DEFAULT_TOKENS if tokens is None and origin["kind"] == "dataset" else tokens


def _read_with(tokenizer, first: int | None, tokens: int | None) -> dict:
    """For the provenance of text: how it was read."""
    name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    found = {"tokenizer": name, "bos_id": first, "bos_added": first is not None}
    return found | {"tokens_asked": None if tokens is None else int(tokens)}


def _from_texts(corpus, tokenizer, tokens, length: int, first: int | None) -> Prompts:
    """Each document as a row; how many were cut, and how many too short ones left out, stands in the source."""
    documents, origin = corpus
    tokens = _wanted(tokens, origin)
    rows, numbers, total, cut, seen = [], [], 0, 0, 0
    with closing(documents):
        for number, ids in enumerate(_encoded(_readable(documents, origin["name"]), tokenizer)):
            row = ids if first is None or first in ids[:1] else np.concatenate([[first], ids])
            total += min(row.size, length)
            if tokens is not None and rows and total > tokens:
                break
            seen, cut = number + 1, cut + (row.size > length)
            if row.size >= 2:
                rows.append(row[:length])
                numbers.append(number)
    if not rows:
        raise UsageError(
            f"{origin['name']} has no text of 2 tokens, of which the last is only a target: give longer texts"
        )
    ids, lengths = padded(rows)
    origin |= _read_with(tokenizer, first, tokens) | {"rows_are": "texts", "length": int(length)}
    origin |= {"documents": seen, "cut": int(cut), "left_out": seen - len(rows)}
    return Prompts(ids, np.array(numbers), origin, lengths=lengths)


def _readable(documents: Iterator[str], name: str) -> Iterator[str]:
    """The documents; UsageError names the first that is no text."""
    for number, text in enumerate(documents, start=1):
        require_text(text, f"document {number} of {name}")
        yield text


def _stream(documents: Iterator[str], tokenizer, joint: int | None, wanted: int | None):
    """The documents as one stream, read no further than `wanted` tokens need.

    An EOS that is there already is not repeated; the one that joins two documents belongs to the second.

    Returns:
        ids int64 [token]; where each document that has any starts, int64 [document]; its index in the source.
    """
    pieces, starts, numbers, total, last = [np.empty(0, np.int64)], [], [], 0, joint
    for number, ids in enumerate(_encoded(documents, tokenizer)):
        if not ids.size:
            continue
        if joint not in (None, last, ids[0]):
            ids = np.concatenate([[joint], ids])
        pieces.append(ids)
        starts.append(total)
        numbers.append(number)
        total, last = total + ids.size, ids[-1]
        if wanted is not None and total >= wanted:
            break
    return np.concatenate(pieces), np.array(starts, np.int64), np.array(numbers, np.int64)


def _encoded(documents: Iterator[str], tokenizer) -> Iterator[np.ndarray]:
    """Few at once to begin with: the first may hold all that is wanted."""
    count = 1
    while batch := list(islice(documents, count)):
        found = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield from (np.asarray(ids, dtype=np.int64) for ids in found["input_ids"])
        count = min(2 * count, _AT_ONCE)


def _pack(stream: np.ndarray, length: int, bos: int | None, limit: int | None):
    """Rows int64 [prompt, length], where in the stream each begins, and where the last one ends."""
    rows, begins, at = [], [], 0
    while at < stream.size and (limit is None or len(rows) < limit):
        added = int(bos is not None and stream[at] != bos)
        end = at + length - added
        if end > stream.size:
            break
        rows.append(np.concatenate([np.full(added, bos or 0, np.int64), stream[at:end]]))
        begins.append(at)
        at = end
    return np.array(rows, np.int64).reshape(-1, length), begins, at


def _holder(starts: np.ndarray, at):
    """Which document holds the tokens `at` of the stream."""
    return np.searchsorted(starts, at, side="right") - 1


def _too_short(name: str, stream: np.ndarray, length: int, bos: int | None) -> UsageError:
    fits = stream.size + int(bos is not None and stream.size > 0 and stream[0] != bos)
    remedy = f"set length to {fits} or less, or give more text" if fits >= 2 else "give more text"
    remedy += ", or make each text a row, --rows-are texts" if fits >= 2 else ""
    return UsageError(f"{name} has {stream.size} tokens, too few for one row of {length}: {remedy}")


# Checks


def _whole_numbers(name: str, given) -> np.ndarray:
    found = as_ids(name, given, "whole numbers in an array or in lists of one length")
    if found.dtype.kind not in "iu":
        raise UsageError(f"{name} holds {found.dtype}: give integers, for example int64")
    return found


def _check_whole(value, name: str, least: int) -> None:
    if not isinstance(value, (int, np.integer)) or value < least:
        raise UsageError(f"{name} {value!r}: give a whole number, {least} or more")


def _check_length(length: int, tokens: int | None, max_length: int | None) -> None:
    _check_whole(length, "length", 2)
    if max_length is not None and length > max_length:
        raise UsageError(f"length {length} is beyond the model: set length to {max_length} or less")
    if tokens is not None and tokens < length:
        raise UsageError(
            f"tokens {tokens} is less than one row: ask for {length} or more, or a smaller length"
        )


def _check_rows(tokens: np.ndarray, name: str) -> None:
    if tokens.ndim != 2:
        raise UsageError(f"{name} has shape {tokens.shape}: give token ids [prompt, position]")
    if tokens.shape[0] == 0:
        raise UsageError(f"{name} has shape {tokens.shape}, no prompt at all: give at least one row")
    if tokens.shape[1] < 2:
        raise UsageError(
            f"{name} has rows of {tokens.shape[1]}: give at least 2 tokens, the last is only a target"
        )


def _check_lengths(lengths: np.ndarray, n: int, length: int) -> None:
    if lengths.shape != (n,):
        raise UsageError(f"lengths has shape {lengths.shape}: give the number of tokens of each of {n} rows")
    bad = np.flatnonzero((lengths < 2) | (lengths > length))
    if bad.size:
        raise UsageError(f"lengths: {lengths[bad[0]]} for row {bad[0]} is not one of 2 to {length}, the row's own")


def _check_counted(counted: np.ndarray, shape: tuple[int, int]) -> None:
    if not isinstance(counted, np.ndarray):
        raise UsageError(f"counted is a {type(counted).__name__}: give a NumPy array of True and False")
    if counted.shape != shape:
        raise UsageError(
            f"counted has shape {counted.shape}: give True or False for each of {shape}, the tokens with a next one"
        )
    if counted.dtype != bool:
        raise UsageError(f"counted holds {counted.dtype}: give True or False for each token")
    if not counted.any():
        raise UsageError(
            "counted is False everywhere: nothing is asked about; leave it out, or name some tokens"
        )


def _check_ids(tokens: np.ndarray, vocab_size: int | None, name: str) -> None:
    limit = np.iinfo(np.int64).max if vocab_size is None else vocab_size
    bad = np.argwhere((tokens < 0) | (tokens >= limit))
    if bad.size:
        prompt, at = bad[0]
        raise UsageError(
            f"{name}: token id {tokens[prompt, at]} at prompt {prompt}, position {at} is not one of"
            f" 0 to {limit - 1}: use ids made with this model's tokenizer"
        )
