import keras
import numpy as np
import pytest
from harness import as_numpy, compiled, lengths, random
from keras import ops

from keras_transformer.layers import PositionalEmbedding
from keras_transformer.scopes import DecodingScope

X = random(2, 6, 8)


def sinusoids(positions, dim):
    """Section 3.5 of the paper, number by number."""
    table = np.zeros((len(positions), dim))
    for row, position in enumerate(positions):
        for i in range(dim):
            angle = position / 10000 ** (2 * (i // 2) / dim)
            table[row, i] = np.sin(angle) if i % 2 == 0 else np.cos(angle)
    return table


@pytest.mark.parametrize("dim", [2, 7, 8])
@pytest.mark.parametrize("offset", [0, 5])
def test_sines_may_come_before_the_cosines(dim, offset):
    x = random(2, 20, dim)
    table = sinusoids(range(offset, 20 + offset), dim)
    halves = np.concatenate([table[:, 0::2], table[:, 1::2]], axis=-1)
    output = as_numpy(PositionalEmbedding(interleaved=False, offset=offset)(x))
    np.testing.assert_allclose(output, x + halves, atol=1e-5)
    side_by_side = as_numpy(PositionalEmbedding(offset=offset)(x))
    np.testing.assert_allclose(side_by_side, x + table, atol=1e-5)


@pytest.mark.parametrize("dim", [2, 7, 8, 64])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_sinusoids_are_those_of_the_paper(dim, scale):
    x = random(2, 300, dim)
    output = as_numpy(PositionalEmbedding(scale=scale)(x))
    np.testing.assert_allclose(output, scale * x + sinusoids(range(300), dim), atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_learned_positions_are_rows_of_the_table(scale):
    layer = PositionalEmbedding("learned", 9, scale=scale, name="positions")
    output = as_numpy(layer(X))
    assert [weight.path for weight in layer.weights] == ["positions/position_table"]
    np.testing.assert_allclose(output, scale * X + as_numpy(layer.position_table)[:6], atol=1e-6)


def test_an_offset_leaves_rows_in_front_and_max_length_counts_positions():
    layer = PositionalEmbedding("learned", 6, offset=2)
    output = as_numpy(layer(X))
    table = as_numpy(layer.position_table)
    assert table.shape == (8, 8)
    np.testing.assert_allclose(output, X + table[2:], atol=1e-6)
    with pytest.raises(ValueError, match="max_length=6; received length 7"):
        layer(random(2, 7, 8))


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
@pytest.mark.parametrize("jit", [False, True])
def test_decoding_goes_on_behind_the_offset(kind, jit):
    layer = PositionalEmbedding(kind, 6, offset=3, interleaved=kind == "learned")
    whole = as_numpy(layer(X))

    def step(x, index):
        with DecodingScope(index=index, max_length=6):
            return layer(x)

    step = compiled(step) if jit else step
    for index in range(6):
        piece = ops.convert_to_tensor(X[:, index : index + 1])
        output = as_numpy(step(piece, ops.convert_to_tensor(index, dtype="int32")))
        np.testing.assert_allclose(output, whole[:, index : index + 1], atol=1e-6)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
@pytest.mark.parametrize(
    ("mask", "positions"),
    [
        ([1, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5]),
        ([0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 2, 3]),
        ([1, 1, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5]),
        ([0, 1, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4]),
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
    ],
)
def test_positions_count_from_the_first_real_token(kind, mask, positions):
    layer = PositionalEmbedding(kind, 6)
    both = np.array([mask, [True] * 6], bool)
    output = as_numpy(layer(X, mask=ops.convert_to_tensor(both)))
    table = sinusoids(range(6), 8) if kind == "sinusoidal" else as_numpy(layer.position_table)
    np.testing.assert_allclose(output[0], X[0] + table[positions], atol=1e-5)
    np.testing.assert_allclose(output[1], X[1] + table, atol=1e-5)


def test_the_mask_of_an_embedding_is_found_and_passed_on():
    ids = keras.Input((None,), dtype="int32")
    embedding = keras.layers.Embedding(5, 8, mask_zero=True)
    model = keras.Model(ids, PositionalEmbedding()(embedding(ids)))
    output = model(np.array([[0, 0, 3]]))
    np.testing.assert_allclose(
        as_numpy(output)[0, 2], as_numpy(embedding.embeddings)[3] + sinusoids([0], 8)[0], atol=1e-6
    )
    assert as_numpy(keras.src.backend.get_keras_mask(output)).tolist() == [[False, False, True]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_far_positions_keep_their_precision(dtype):
    output = as_numpy(PositionalEmbedding(dtype=dtype)(np.zeros((1, 3000, 4), "float32")))
    np.testing.assert_allclose(output[0], sinusoids(range(3000), 4), atol=1e-2)


def test_a_shorter_input_takes_the_first_positions():
    layer = PositionalEmbedding("learned", 6)
    whole = as_numpy(layer(X))
    np.testing.assert_array_equal(as_numpy(layer(X[:, :2])), whole[:, :2])
    masked = layer(X, mask=ops.convert_to_tensor(lengths(6, 6, size=6)))
    np.testing.assert_array_equal(as_numpy(masked), whole)
