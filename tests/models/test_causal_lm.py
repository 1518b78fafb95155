"""A language model: its parts, that it sees no future and no padding, and that it learns and goes on with a text."""

import keras
import numpy as np
import pytest
from harness import as_numpy
from keras import ops

import keras_transformer as kt

SIZES = {"dim": 16, "depth": 2, "num_heads": 2}
VARIANTS = {
    "rotary": {},
    "learned": {"position": "learned", "max_length": 16, "tied_output": False},
    "sinusoidal": {"position": "sinusoidal"},
    "gated": {"gated": True, "activation": "silu", "hidden_dim": 24},
}


def tokens(rows=2, length=9):
    return np.random.default_rng(0).integers(1, 50, (rows, length)).astype("int32")


def logits_of(model, ids):
    return as_numpy(model(ops.convert_to_tensor(ids)))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_neither_future_nor_padding_is_seen(options, tmp_path):
    model = kt.models.causal_lm(50, **SIZES, **options)
    ids = tokens()
    logits = logits_of(model, ids)
    assert logits.shape == (2, 9, 50)
    changed = ids.copy()
    changed[:, 6:] = changed[:, 6:] % 49 + 1
    np.testing.assert_allclose(logits_of(model, changed)[:, :6], logits[:, :6], atol=1e-5)
    assert np.abs(logits_of(model, changed)[:, 6:] - logits[:, 6:]).max() > 1e-3
    left = np.pad(ids, ((0, 0), (3, 0)))
    np.testing.assert_allclose(logits_of(model, left)[:, 3:], logits, atol=1e-5)
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(logits_of(keras.models.load_model(tmp_path / "model.keras"), ids), logits, atol=1e-6)


def test_order_matters():
    """Attention alone knows no order; each kind of position tells the same tokens in another order apart."""
    ids = tokens(1)
    turned = ids[:, [2, 1, 0, *range(3, 9)]]
    for options in VARIANTS.values():
        model = kt.models.causal_lm(50, **SIZES, **options)
        assert np.abs(logits_of(model, turned)[:, -1] - logits_of(model, ids)[:, -1]).max() > 1e-4


def test_parameters_of_nanogpt():
    """The model of its Shakespeare recipe for processors: 0.80 million parameters, positions left out."""
    size, dim, depth = 65, 128, 4
    model = kt.models.causal_lm(size, dim, depth, 4, position="learned", max_length=64)
    block = 12 * dim * dim + 13 * dim  # Projections and their biases, two norms.
    assert model.count_params() == (size + 64) * dim + depth * block + 2 * dim


def test_it_learns_to_count_and_goes_on():
    keras.utils.set_random_seed(1)
    begin = np.random.default_rng(0).integers(0, 10, (128, 1))
    counted = ((begin + np.arange(9)) % 10 + 1).astype("int32")
    model = kt.models.causal_lm(11, dim=32, depth=1, num_heads=2, dropout=0.0)
    model.compile(keras.optimizers.Adam(1e-2), kt.training.SmoothedCrossEntropy(0.0))
    model.fit(counted[:, :-1], counted[:, 1:], epochs=25, batch_size=64, verbose=0)
    assert model.evaluate(counted[:, :-1], counted[:, 1:], verbose=0) < 0.1
    generated = kt.generation.Generator(model, jit_compile=False).generate({"token_ids": [[3, 4, 5], [9, 10]]}, 4)
    assert generated.tolist() == [[6, 7, 8, 9], [1, 2, 3, 4]]


BAD_INPUT = {
    "position": ({"position": "absolute"}, r"`position` must be one of \('rotary', .*received position='absolute'"),
    "depth": ({"depth": 0}, "`depth` must be a positive number of blocks; received depth=0"),
    "no length": ({"position": "learned"}, "`max_length` must be given for learned positions"),
    "length": ({"max_length": 9}, "for no others, which have no limit; received position='rotary', max_length=9"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        kt.models.causal_lm(9, **arguments)


def test_without_a_mask_no_token_is_padding(tmp_path):
    masked, free = (kt.models.causal_lm(50, **SIZES, mask_zero=mask_zero) for mask_zero in (True, False))
    free.set_weights(masked.get_weights())
    ids = tokens()
    np.testing.assert_allclose(logits_of(free, ids), logits_of(masked, ids), atol=1e-5)
    ids[:, 3] = 0
    assert np.abs(logits_of(free, ids)[:, 4:] - logits_of(masked, ids)[:, 4:]).max() > 1e-3
    free.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(logits_of(loaded, ids), logits_of(free, ids), atol=1e-5)
    prompts = [[5, 6, 7], [8]]
    generated = [kt.generation.Generator(model).generate(prompts, max_new_tokens=5) for model in (masked, loaded)]
    np.testing.assert_array_equal(*generated)
