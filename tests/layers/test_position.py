"""Rotations and biases against the formulas of the papers, in float64, and what makes them positions of each other."""

import math

import numpy as np
import pytest
from harness import as_numpy, compiled, random
from keras import ops

from keras_transformer.layers import AlibiBias, MultiHeadSelfAttention, RelativePositionBias, RotaryEmbedding

BASE, DIM = 10000.0, 16


def plain(length):
    return BASE ** (-2 * np.arange(DIM // 2) / DIM), 1.0


def linear(length, factor):
    """Positions are divided by the factor."""
    return plain(length)[0] / factor, 1.0


def dynamic(length, factor, original):
    """The base grows as soon as the sequence is longer than those of training."""
    base = BASE
    if length > original:
        base *= (factor * length / original - (factor - 1)) ** (DIM / (DIM - 2))
    return base ** (-2 * np.arange(DIM // 2) / DIM), 1.0


def llama3(length, factor, low, high, original):
    """Short wavelengths stay, long ones stretch, and those between go over from one to the other."""
    frequencies = []
    for frequency in plain(length)[0]:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            frequencies.append(frequency)
        elif wavelength > original / low:
            frequencies.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            frequencies.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(frequencies), 1.0


def yarn(length, factor, original, fast=32, slow=1, truncate=True, attention_factor=None):
    """Equations 17 to 23 of the YaRN paper; the ramp goes over dimensions, as in its authors' code."""

    def dimension(turns):
        return DIM * math.log(original / (2 * math.pi * turns)) / (2 * math.log(BASE))

    low, high = dimension(fast), dimension(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, DIM - 1)
    frequencies = []
    for i, frequency in enumerate(plain(length)[0]):
        ramp = min(max((i - low) / (high - low), 0), 1)
        frequencies.append(ramp * frequency / factor + (1 - ramp) * frequency)
    return np.array(frequencies), 0.1 * math.log(factor) + 1 if attention_factor is None else attention_factor


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
SCALINGS = [
    (None, lambda n: plain(n)),
    ({"rope_type": "linear", "factor": 4.0}, lambda n: linear(n, 4.0)),
    (
        {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 10},
        lambda n: dynamic(n, 2.0, 10),
    ),
    (LLAMA3, lambda n: llama3(n, 8.0, 1.0, 4.0, 512)),
    (
        {**LLAMA3, "factor": 32.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 64},
        lambda n: llama3(n, 32.0, 1.0, 2.0, 64),
    ),
    (YARN, lambda n: yarn(n, 4.0, 2048)),
    ({**YARN, "beta_fast": 16, "beta_slow": 2}, lambda n: yarn(n, 4.0, 2048, 16, 2)),
    ({**YARN, "truncate": False}, lambda n: yarn(n, 4.0, 2048, truncate=False)),
    ({**YARN, "attention_factor": 1.5}, lambda n: yarn(n, 4.0, 2048, attention_factor=1.5)),
    (
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
        lambda n: yarn(n, 4.0, 2048, attention_factor=(0.1 * math.log(4) + 1) / (0.08 * math.log(4) + 1)),
    ),
]


def rotated(x, positions, frequencies, factor, interleaved):
    """Each pair of features as a complex number, turned."""
    x = x.astype("float64")
    half = x.shape[-1] // 2
    pairs = x[..., 0::2] + 1j * x[..., 1::2] if interleaved else x[..., :half] + 1j * x[..., half:]
    turned = pairs * factor * np.exp(1j * np.asarray(positions)[:, None] * frequencies)
    if interleaved:
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("length", [6, 24])
@pytest.mark.parametrize(
    ("scaling", "expected"), SCALINGS, ids=lambda value: (value or {}).get("rope_type") if not callable(value) else ""
)
def test_rotary_turns_by_the_angles_of_its_paper(scaling, expected, length, interleaved):
    x = random(2, 3, length, DIM)
    layer = RotaryEmbedding(BASE, interleaved=interleaved, scaling=scaling)
    frequencies, factor = expected(length)
    np.testing.assert_allclose(
        as_numpy(layer(x)), rotated(x, np.arange(length), frequencies, factor, interleaved), atol=5e-5
    )


@pytest.mark.parametrize("positions", [[5], [3, 9, 11], [0, 0, 40]])
@pytest.mark.parametrize(("scaling", "expected"), [SCALINGS[0], SCALINGS[2]], ids=["plain", "dynamic"])
def test_rotary_at_given_positions(positions, scaling, expected):
    """The sequence is as long as its last position says, not as the part of it that is rotated."""
    x = random(1, 2, len(positions), DIM)
    frequencies, _ = expected(max(positions) + 1)
    output = RotaryEmbedding(scaling=scaling)(x, ops.convert_to_tensor(positions, "int32"))
    np.testing.assert_allclose(as_numpy(output), rotated(x, positions, frequencies, 1.0, False), atol=5e-5)


def test_rotary_of_the_leading_features_leaves_the_others_alone():
    x = random(1, 2, 5, 20)
    output = as_numpy(RotaryEmbedding(dim=DIM)(x))
    np.testing.assert_array_equal(output[..., DIM:], x[..., DIM:])
    np.testing.assert_allclose(
        output[..., :DIM], rotated(x[..., :DIM], np.arange(5), plain(5)[0], 1.0, False), atol=1e-5
    )


@pytest.mark.parametrize(("scaling", "expected"), SCALINGS[:2] + SCALINGS[3:6], ids=lambda value: None)
@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_of_rotated_vectors_depend_on_their_distance_alone(scaling, expected, interleaved):
    layer = RotaryEmbedding(interleaved=interleaved, scaling=scaling)
    query, key = random(1, 2, 1, DIM), random(1, 2, 1, DIM, seed=1)

    def score(query_position, key_position):
        parts = [
            layer(x, ops.convert_to_tensor([at], "int32")) for x, at in ((query, query_position), (key, key_position))
        ]
        return as_numpy(ops.sum(parts[0] * parts[1], axis=-1))

    for shift in (1, 17, 100):
        np.testing.assert_allclose(score(5 + shift, 2 + shift), score(5, 2), atol=2e-4)
    assert not np.allclose(score(5, 2), score(5, 4), atol=1e-2)


def t5_bucket(relative, bidirectional, num_buckets, max_distance):
    """The bucket of a key `relative` positions after the query, as the T5 code has it, for one number, exactly."""
    bucket = 0
    if bidirectional:
        num_buckets //= 2
        bucket = num_buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = num_buckets // 2
    if distance < exact:
        return bucket + distance
    # log(distance / exact) / log(max_distance / exact) * rest, rounded down: an integer power settles it exactly.
    rest = num_buckets - exact
    far = 0
    while far < rest - 1 and distance**rest * exact ** (far + 1) >= max_distance ** (far + 1) * exact**rest:
        far += 1
    return bucket + exact + far


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 16), (16, 100), (64, 256)])
@pytest.mark.parametrize("jit", [False, True])
def test_buckets_are_those_of_t5(bidirectional, num_buckets, max_distance, jit):
    layer = RelativePositionBias(2, num_buckets, max_distance, bidirectional)
    layer.build()
    layer.bias_table.assign(np.stack([np.arange(num_buckets), -np.arange(num_buckets)], axis=-1))
    relative = np.arange(-300, 301)
    bias = compiled(layer.bias) if jit else layer.bias
    found = as_numpy(bias(ops.convert_to_tensor([300], "int32"), ops.convert_to_tensor(300 + relative, "int32")))
    expected = [t5_bucket(int(r), bidirectional, num_buckets, max_distance) for r in relative]
    np.testing.assert_array_equal(found[0, 0, 0], expected)
    np.testing.assert_array_equal(found[0, 1, 0], -np.array(expected))


@pytest.mark.parametrize(
    ("num_heads", "slopes"),
    [
        (1, [2**-8]),
        (2, [2**-4, 2**-8]),
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (8, [2.0**-i for i in range(1, 9)]),
        # Not a power of 2: those of the power below, then every other one of the power above.
        (3, [2**-4, 2**-8, 2**-2]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (12, [2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
    ],
)
def test_alibi_slopes_are_those_of_the_paper(num_heads, slopes):
    bias = as_numpy(AlibiBias(num_heads)(random(2, 6, 4)))
    distance = np.abs(np.arange(6)[:, None] - np.arange(6))
    np.testing.assert_allclose(bias, -np.array(slopes)[None, :, None, None] * distance, rtol=1e-6)


@pytest.mark.parametrize("position", [RelativePositionBias(2), AlibiBias(2)], ids=lambda layer: type(layer).__name__)
def test_a_bias_shared_by_layers_equals_one_of_their_own(position):
    """T5 makes the bias once and hands it to every layer."""
    x = random(2, 5, 8)
    own = MultiHeadSelfAttention(2, position=position)
    expected = own(x)
    shared = MultiHeadSelfAttention(2)
    shared.build(x.shape)
    shared.set_weights([w for w in own.get_weights() if w.shape != (32, 2)])
    position = own.position
    np.testing.assert_allclose(as_numpy(shared(x, attention_bias=position(x))), as_numpy(expected), atol=1e-6)
    extra = random(2, 1, 5, 5)
    np.testing.assert_allclose(
        as_numpy(shared(x, attention_bias=position(x) + ops.convert_to_tensor(extra))),
        as_numpy(own(x, attention_bias=extra)),
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_far_positions_keep_their_precision(dtype):
    """Angles and distances are reckoned in float32: bfloat16 cannot tell 4,000 from 4,010."""
    position = ops.convert_to_tensor([4000, 4010], "int32")
    x = np.ones((1, 1, 2, DIM), "float32")
    output = as_numpy(RotaryEmbedding(dtype=dtype)(ops.cast(x, dtype), position))
    np.testing.assert_allclose(output, rotated(x, [4000, 4010], plain(0)[0], 1.0, False), atol=1e-2)
    bias = as_numpy(AlibiBias(1, dtype=dtype).bias(position, position))
    np.testing.assert_allclose(bias[0, 0], [[0, -10 / 256], [-10 / 256, 0]])
