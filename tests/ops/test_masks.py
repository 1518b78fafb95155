import numpy as np
import pytest
from harness import as_numpy, compiled, dtype_of
from keras import ops

from keras_transformer.ops import check_mask, first_real, make_attention_mask

UNEVEN_KEYS = np.array([[True, True, True, True, False], [False, True, True, True, True]])
UNEVEN = np.array([[True, True, True, False], [False, True, True, True]])


@pytest.mark.parametrize(
    ("query", "key", "arguments", "allowed"),
    [
        (range(3), range(4), {"causal": True}, lambda b, q, k: k <= q),
        ([2, 3], range(6), {"causal": True}, lambda b, q, k: k <= q),
        ([5], range(8), {"causal": True, "window": 2}, lambda b, q, k: q - 1 <= k <= q),
        (range(5), range(5), {"window": 1}, lambda b, q, k: q == k),
        (range(5), range(4), {"window": 3}, lambda b, q, k: abs(q - k) < 3),
        (range(3), range(4), {"padding": UNEVEN}, lambda b, q, k: UNEVEN[b, k]),
        (range(3), range(4), {"causal": True, "padding": UNEVEN}, lambda b, q, k: k <= q and UNEVEN[b, k]),
        (
            range(1, 4),
            range(4),
            {"causal": True, "window": 2, "padding": UNEVEN},
            lambda b, q, k: 0 <= q - k < 2 and UNEVEN[b, k],
        ),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_mask_says_who_may_attend_to_whom(query, key, arguments, allowed, jit):
    query, key = np.array(query, "int32"), np.array(key, "int32")
    padding = arguments.get("padding")

    def make(query, key):
        tensor = None if padding is None else ops.convert_to_tensor(padding)
        return make_attention_mask(query, key, **{**arguments, "padding": tensor})

    mask = (compiled(make) if jit else make)(ops.convert_to_tensor(query), ops.convert_to_tensor(key))
    assert dtype_of(mask) == "bool"
    expected = [[[allowed(b, q, k) for k in key] for q in query] for b in range(2)]
    np.testing.assert_array_equal(np.broadcast_to(as_numpy(mask), (2, len(query), len(key))), expected)


@pytest.mark.parametrize("window", [None, 2])
def test_a_prefix_sees_itself_whatever_else_is_said(window):
    keys = np.array([[True, True, True, False, False], [False, True, True, True, False]])
    queries = keys[:, 1:4]
    mask = as_numpy(make_attention_mask(np.arange(1, 4), np.arange(5), True, window, UNEVEN_KEYS, (queries, keys)))
    for b, q, k in np.ndindex(mask.shape):
        near = k <= q + 1 and (window is None or q + 1 - k < window)
        assert mask[b, q, k] == ((near or (queries[b, q] and keys[b, k])) and UNEVEN_KEYS[b, k])
    both_ways = make_attention_mask(np.arange(3), np.arange(3), prefix=(keys[:, :3], keys[:, :3]))
    assert both_ways is None  # Who sees everything sees a prefix.


def test_positions_of_each_row():
    query, key = np.array([[0, 1], [2, 3]]), np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    mask = as_numpy(make_attention_mask(query, key, causal=True))
    np.testing.assert_array_equal(mask, key[:, None, :] <= query[:, :, None])


def test_nothing_to_mask_is_none():
    assert make_attention_mask(np.arange(3), np.arange(3)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "`window` must be a positive number of positions; received window=0"),
        ({"window": -2, "causal": True}, "window=-2"),
        ({"padding": np.ones((2, 3))}, r"`padding` must be boolean \(True = attend\); received dtype float64"),
        ({"padding": np.ones((2, 3), "int32")}, "received dtype int32"),
        ({"causal": True, "prefix": (np.ones((2, 3)), np.ones((2, 3)))}, "`prefix` must be boolean"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_attention_mask(np.arange(3), np.arange(3), **arguments)


@pytest.mark.parametrize(
    ("mask", "shape", "fits"),
    [
        (np.ones((2, 5), bool), (2, 5), True),
        (np.ones((2, 5), bool), (None, 5), True),
        (np.ones((2, 5), bool), (2, None), True),
        (np.ones((1, 5), bool), (2, 5), True),
        (np.ones((2, 1), bool), (2, 5), False),
        (np.ones((2, 4), bool), (2, 5), False),
        (np.ones((3, 5), bool), (2, 5), False),
        (np.ones((2, 1, 5), bool), (2, 5), False),
        (np.ones(5, bool), (2, 5), False),
    ],
)
def test_check_mask_knows_the_shapes_that_fit(mask, shape, fits):
    if fits:
        assert check_mask(mask, "mask", shape, "`x`") is mask
        return
    with pytest.raises(ValueError, match="`mask` must have shape .* to match `x`; received"):
        check_mask(mask, "mask", shape, "`x`")


def test_check_mask_names_both_shapes():
    with pytest.raises(ValueError) as error:
        check_mask(np.ones((2, 11), bool), "context_mask", (2, 17), "`context`")
    assert "`context_mask` must have shape (batch, 17) to match `context`; received (2, 11)." in str(error.value)


@pytest.mark.parametrize("values", [[[1.0, 0.0]], [[1, 0]], np.zeros((1, 2), "float16")])
def test_a_mask_that_is_not_boolean_says_what_a_mask_is(values):
    with pytest.raises(
        ValueError, match=r"`mask` must be boolean \(True = attend\).*`attention_bias`.*cast\(mask, 'bool'\)"
    ):
        check_mask(values, "mask")


def test_first_real_counts_the_padding_before():
    mask = np.array([[0, 0, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], bool)
    counts = first_real(mask)
    assert dtype_of(counts) == "int32"
    assert as_numpy(counts).tolist() == [[2], [0], [5], [4]]
