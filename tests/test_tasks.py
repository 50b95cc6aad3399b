"""Prompts made for a task: balanced, of equal length, of names that are one token; and edits of single tokens."""

from collections import Counter

import numpy as np
import pytest

from selfrepair_nn.errors import UsageError
from selfrepair_nn.models.load import describe, load_tokenizer
from selfrepair_nn.prompts import Prompts
from selfrepair_nn.tasks import NAMES, TEMPLATES, edited_prompts, ioi_prompts, repeated_prompts

COUNT = 64


class Words:
    """A tokenizer of whole words and commas, spaces before them; `halved` words are two tokens. BOS is id 0."""

    bos_token_id, eos_token_id, all_special_ids = 0, None, [0]

    def __init__(self, halved=()):
        self.halved, self.ids = set(halved), {"<bos>": 0}

    def __len__(self):
        return 40

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        pieces = []
        for word in text.replace(",", " ,").split():
            pieces += [word[:1] + "-", "-" + word[1:]] if word in self.halved else [word]
        return {"input_ids": [self.ids.setdefault(piece, len(self.ids)) for piece in pieces]}

    def decode(self, ids, **_):
        return " ".join(list(self.ids)[i] for i in ids)


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer(describe("tiny-neox", None).source)


def sentences(prompts, tokenizer):
    """Every row as text without BOS, its other token as text."""
    rows = [tokenizer.decode(row[1:].tolist()).replace(" ,", ",") for row in prompts.tokens]
    return rows, [tokenizer.decode([token]).strip() for token in prompts.other[:, -1]]


def named(row):
    """The names of a sentence in order, that must be four: first, second, subject, indirect object."""
    found = [word.strip(",") for word in row.split() if word.strip(",") in NAMES]
    assert len(found) == 4
    return found


@pytest.mark.parametrize("made_by", ["tiny", "words"])
def test_ioi_is_balanced_in_names_order_and_templates(tiny, made_by):
    tokenizer = tiny if made_by == "tiny" else Words()
    prompts = ioi_prompts(tokenizer, COUNT)
    rows, others = sentences(prompts, tokenizer)
    assert prompts.n == COUNT == len(set(rows))
    kinds = Counter()
    for row, other, document in zip(rows, others, prompts.document, strict=True):
        first, second, subject, last = named(row)
        assert {first, second} == {subject, last}
        assert first != second
        assert other == subject
        kinds[document, min(first, second) == first, min(first, second) == subject] += 1
    assert set(kinds.values()) == {1}
    assert len(kinds) == COUNT
    verbs = Counter(
        verb for row in rows for verb in ("gave", "brought", "sent", "passed") if f" {verb} " in row
    )
    assert verbs == dict.fromkeys(("gave", "brought", "sent", "passed"), COUNT // 4)


def test_ioi_asks_at_the_last_position_only():
    prompts = ioi_prompts(Words(), 8)
    assert prompts.other.shape == (8, prompts.length - 1)
    np.testing.assert_array_equal(prompts.other[:, :-1], prompts.tokens[:, 1:-1])
    assert (prompts.other[:, -1] != prompts.tokens[:, -1]).all()


def test_templates_are_equally_long():
    assert len({len(template.split()) for template in TEMPLATES}) == 1
    assert len({template.count(",") for template in TEMPLATES}) == 1


def test_ioi_leaves_out_names_of_two_tokens_and_rows_of_other_lengths():
    tokenizer = Words({"Mary", "John", "sent"})
    prompts = ioi_prompts(tokenizer, COUNT)
    rows, _ = sentences(prompts, tokenizer)
    assert set(NAMES) - set(prompts.source["names"]) == {"Mary", "John"}
    assert not any(word in row.split() for row in rows for word in ("Mary", "John", "s-"))
    assert (prompts.source["drawn"], prompts.source["kept"], prompts.n) == (COUNT, 48, 48)
    assert set(Counter(prompts.document.tolist()).values()) == {4}


def test_ioi_is_the_same_for_a_seed():
    first, again, other = (ioi_prompts(Words(), 16, seed).sha256 for seed in (1, 1, 2))
    assert first == again != other


def test_ioi_names_what_is_wrong():
    with pytest.raises(UsageError, match=f"3 of {len(NAMES)} names as one token"):
        ioi_prompts(Words(NAMES[3:]), 8)
    for count in (0, 6, 8.0):
        with pytest.raises(UsageError, match="multiple of 4"):
            ioi_prompts(Words(), count)
    with pytest.raises(UsageError, match="tokenizer"):
        ioi_prompts(None, 8)


@pytest.mark.parametrize("bos", ["auto", "never"])
def test_repeated_tokens_repeat_and_nothing_else_does(tiny, bos):
    prompts = repeated_prompts(tiny, 2048, count=5, period=9, bos=bos)
    begins = int(bos == "auto")
    assert prompts.tokens.shape == (5, begins + 18)
    assert (prompts.tokens[:, :begins] == tiny.bos_token_id).all()
    halves = prompts.tokens[:, begins:].reshape(5, 2, 9)
    np.testing.assert_array_equal(halves[:, 0], halves[:, 1])
    assert all(len(set(half)) == 9 for half in halves[:, 0].tolist())
    assert not set(halves.ravel().tolist()) & set(tiny.all_special_ids)
    assert len({tuple(half) for half in halves[:, 0].tolist()}) == 5


def test_repeated_tokens_are_drawn_from_the_whole_vocabulary():
    prompts = repeated_prompts(None, 7, count=3, period=7)
    assert prompts.tokens.shape == (3, 14)
    assert all(sorted(row[:7]) == list(range(7)) for row in prompts.tokens.tolist())
    tokens = repeated_prompts(Words(), 50, count=40, period=20).tokens[:, 1:]
    assert set(tokens.ravel().tolist()) == set(range(1, 40))


@pytest.mark.parametrize(("choice", "said"), [({"period": 2}, "period 2"), ({"period": 8}, "3 to 7"),
                                              ({"count": 0}, "0 prompts")])  # fmt: skip
def test_repeated_tokens_name_what_is_wrong(choice, said):
    with pytest.raises(UsageError, match=said):
        repeated_prompts(None, 7, **({"period": 4} | choice))


def rows_of(*texts):
    words = Words()
    tokens = np.array([words(text, add_special_tokens=False)["input_ids"] for text in texts])
    return words, Prompts(tokens, np.arange(len(tokens)), {"name": "rows"})


def test_an_edit_exchanges_every_such_token_and_drops_rows_without_one():
    words, prompts = rows_of("a , b , c", "a b c d e", ", a a a a")
    edited = edited_prompts(prompts, words, ",", "d")
    assert [words.decode(row) for row in edited.tokens] == ["a , b , c", ", a a a a"]
    assert [words.decode(row) for row in edited.counterfactual] == ["a d b d c", "d a a a a"]
    assert edited.document.tolist() == [0, 2]
    edit = edited.source["edit"]
    assert (edit["exchanged"], edit["rows_dropped"], edit["old"], edit["new"]) == (3, 1, ",", "d")
    assert edited.sha256 != prompts.sha256


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("a b", "c", "'a b' is not one token"),
        ("a", "", "'' is not one token"),
        ("a", "a", "changes nothing"),
        ("z", "a", "no prompt has"),
    ],
)
def test_an_edit_names_what_is_wrong(old, new, said):
    words, prompts = rows_of("a , b , c")
    with pytest.raises(UsageError, match=said):
        edited_prompts(prompts, words, old, new)


def test_an_edit_needs_a_tokenizer():
    with pytest.raises(UsageError, match="tokenizer"):
        edited_prompts(rows_of("a b")[1], None, "a", "b")
