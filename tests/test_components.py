"""Names of places: what a user writes and what it selects."""

import pytest

from selfrepair_nn.components import Head, components, select_heads
from selfrepair_nn.errors import UsageError


def labels(layers, heads, n_layers=12, n_heads=4):
    return [h.label for h in select_heads(layers, heads, n_layers, n_heads)]


def test_nothing_asked_is_every_head_in_order():
    assert select_heads(None, None, 2, 2) == (Head(0, 0), Head(0, 1), Head(1, 0), Head(1, 1))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("3", [3]),
        ("8:12", [8, 9, 10, 11]),
        ("10:", [10, 11]),
        (":2", [0, 1]),
        ("-1", [11]),
        ("-2:", [10, 11]),
        ("0,5,-1", [0, 5, 11]),
        ("5,0,5", [0, 5]),
        (" 1 , 2 ", [1, 2]),
    ],
)
def test_layers(layers, expected):
    assert sorted({h.layer for h in select_heads(layers, None, 12, 4)}) == expected


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ("9.3", ["L9H3"]),
        ("L9H3", ["L9H3"]),
        ("10.*", ["L10H0", "L10H1", "L10H2", "L10H3"]),
        ("9.3,0.1", ["L0H1", "L9H3"]),
        ("9.3,9.3", ["L9H3"]),
    ],
)
def test_heads(heads, expected):
    assert labels(None, heads) == expected


def test_layers_and_heads_together_are_the_intersection():
    assert labels("9:", "9.3,2.1") == ["L9H3"]


@pytest.mark.parametrize(
    ("layers", "heads", "said"),
    [
        ("12", None, "0 to 11"),
        ("-13", None, "0 to 11"),
        ("8:13", None, "0 to 11"),
        ("5:5", None, "no layer"),
        ("a", None, "'a'"),
        ("1;2", None, "'1;2'"),
        ("", None, "empty"),
        (None, "12.0", "0 to 11"),
        (None, "0.4", "0 to 3"),
        (None, "9-6", "layer.head"),
        (None, "9", "layer.head"),
        (None, ",", "empty"),
        ("0:2", "9.3", "no head"),
    ],
)
def test_what_cannot_be_selected_is_explained(layers, heads, said):
    with pytest.raises(UsageError, match=said):
        select_heads(layers, heads, 12, 4)


def test_components_in_order():
    found = [c.label for c in components(2, 2, position_embedding=True, attention_bias=True)]
    assert found == [
        "embed", "pos_embed",
        "L0H0", "L0H1", "L0.attention_bias", "L0.mlp",
        "L1H0", "L1H1", "L1.attention_bias", "L1.mlp",
    ]  # fmt: skip


def test_components_that_a_model_lacks_are_left_out():
    found = components(1, 1, position_embedding=False, attention_bias=False)
    assert [(c.label, c.kind, c.layer, c.head) for c in found] == [
        ("embed", "embedding", -1, -1),
        ("L0H0", "head", 0, 0),
        ("L0.mlp", "mlp", 0, -1),
    ]
