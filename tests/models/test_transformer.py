import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from harness import BACKEND, as_numpy, case_id, pairs
from keras import ops

import keras_transformer as kt

SMALL = {"dim": 8, "depth": 1, "num_heads": 2, "hidden_dim": 16}
SOURCE = np.array([[5, 6, 7, 8, 0, 0], [9, 4, 6, 3, 2, 1]], "int32")
TARGET = np.array([[1, 4, 5, 6, 7], [1, 8, 9, 0, 0]], "int32")


def inputs(source=SOURCE, target=TARGET):
    return {"source_ids": ops.convert_to_tensor(source), "target_ids": ops.convert_to_tensor(target)}


def parameters(source, target, dim, depth, hidden_dim, norm_position="post", shared=False, tied=True):
    """Counted from the paper: weights and biases of every projection, scale and shift of every norm."""
    encoder_depth, decoder_depth = (depth, depth) if isinstance(depth, int) else depth
    attention = 4 * (dim * dim + dim)
    feed_forward = dim * hidden_dim + hidden_dim + hidden_dim * dim + dim
    norms = (2 if norm_position == "sandwich" else 1) * 2 * dim
    encoder = encoder_depth * (attention + feed_forward + 2 * norms)
    decoder = decoder_depth * (2 * attention + feed_forward + 3 * norms)
    last_norms = 0 if norm_position == "post" else 2 * 2 * dim
    embeddings = (target if shared else source + target) * dim
    return embeddings + encoder + decoder + last_norms + (0 if tied else dim * target + target)


NORM_POSITIONS = ("post", "pre", "sandwich")
BUILDS = pairs(norm_position=NORM_POSITIONS, depth=(1, (1, 2), (2, 1)), shared=(False, True), tied=(True, False))


@pytest.mark.parametrize("case", BUILDS, ids=case_id)
def test_shapes_names_and_parameters(case):
    norm_position, depth, shared, tied = case.values()
    target_size = 20 if shared else 17
    model = kt.models.transformer(
        20,
        target_size,
        **{**SMALL, "depth": depth},
        norm_position=norm_position,
        shared_embedding=shared,
        tied_output=tied,
    )
    assert type(model) is keras.Model or type(model).__name__ == "Functional"
    assert [tensor.name for tensor in model.inputs] == ["source_ids", "target_ids"]
    assert all(tensor.shape == (None, None) and tensor.dtype == "int32" for tensor in model.inputs)
    assert model.output.shape == (None, None, target_size)
    assert tuple(model(inputs()).shape) == (2, 5, target_size)
    assert model.count_params() == parameters(20, target_size, 8, depth, 16, norm_position, shared, tied)
    of_decoder = [layer for layer in model.layers if isinstance(layer, kt.layers.DecoderBlock)]
    assert len(of_decoder) == (depth if isinstance(depth, int) else depth[1])
    assert all(layer.norm_position == norm_position for layer in of_decoder)


@pytest.mark.parametrize(
    ("recipe", "size", "near"),
    [
        ({}, 37_000, 63_082_496),  # "65M" in the paper's table 3: 37,000 is its own "about".
        ({"dim": 128, "depth": 4, "num_heads": 4, "hidden_dim": 256}, 9_700, 2_566_656),
    ],
    ids=["base", "tiny"],
)
def test_parameters_of_the_published_models(recipe, size, near):
    model = kt.models.transformer(size, size, shared_embedding=True, **recipe)
    dim, depth, hidden_dim = (
        recipe.get(key, value) for key, value in (("dim", 512), ("depth", 6), ("hidden_dim", 2048))
    )
    assert model.count_params() == parameters(size, size, dim, depth, hidden_dim, shared=True) == near


def test_embeddings_are_shared_and_tied_as_asked():
    model = kt.models.transformer(20, 20, **SMALL, shared_embedding=True)
    tables = [weight for weight in model.weights if tuple(weight.shape) == (20, 8)]
    assert len(tables) == 1
    separate = kt.models.transformer(20, 20, **SMALL)
    tables = [as_numpy(weight) for weight in separate.weights if tuple(weight.shape) == (20, 8)]
    assert len(tables) == 2 and not np.array_equal(*tables)
    assert {"source_embedding", "target_embedding"} <= {layer.name for layer in separate.layers}


@pytest.mark.parametrize("norm_position", NORM_POSITIONS)
def test_padding_and_future_change_nothing(norm_position):
    model = kt.models.transformer(20, 20, **SMALL, norm_position=norm_position)
    expected = as_numpy(model(inputs()))
    shorter = as_numpy(model(inputs(SOURCE[:1, :4], TARGET[:1])))
    np.testing.assert_allclose(expected[:1], shorter, atol=1e-5)
    changed = TARGET.copy()
    changed[:, 3:] = 11
    np.testing.assert_array_equal(as_numpy(model(inputs(target=changed)))[:, :3], expected[:, :3])
    other_source = SOURCE.copy()
    other_source[0, 3] = 12
    assert not np.allclose(as_numpy(model(inputs(other_source)))[0], expected[0])


def test_the_scale_of_embeddings_and_logits_suits_training():
    """Untrained logits are of the order of 1, so that the loss starts near that of guessing."""
    model = kt.models.transformer(200, 200, dim=64, depth=2, num_heads=4, hidden_dim=128)
    logits = as_numpy(model(inputs()))
    assert 0.3 < logits.std() < 3


def reverse_task(rows=64):
    """Pairs to learn from: the target is the source backwards."""
    source = np.random.default_rng(0).integers(4, 12, (rows, 4)).astype("int32")
    target = np.concatenate([np.full((rows, 1), 1), source[:, ::-1], np.full((rows, 1), 2)], axis=1).astype("int32")
    return {"source_ids": source, "target_ids": target[:, :-1]}, target[:, 1:]


@pytest.mark.parametrize(("norm_position", "policy"), [("post", "float32"), ("pre", "mixed_bfloat16")])
def test_a_few_steps_lower_the_loss(norm_position, policy):
    keras.config.set_dtype_policy(policy)
    model = kt.models.transformer(
        12,
        12,
        dim=16,
        depth=1,
        num_heads=2,
        hidden_dim=32,
        norm_position=norm_position,
        shared_embedding=True,
        dropout=0.0,
    )
    model.compile(keras.optimizers.Adam(5e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(*reverse_task(), epochs=6, batch_size=32, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    assert history[-1] < history[0] - 0.2


FRESH = """
import json, sys
import numpy as np
import keras, keras_transformer

folder = sys.argv[1]
model = keras.models.load_model(folder + "/model.keras")
data = dict(np.load(folder + "/data.npz"))
inputs = {name: keras.ops.convert_to_tensor(data[name][:2]) for name in ("source_ids", "target_ids")}
np.savez(
    folder + "/fresh.npz",
    output=keras.ops.convert_to_numpy(model(inputs)),
    **{f"weight_{i}": value for i, value in enumerate(model.get_weights())},
    **{f"optimizer_{i}": keras.ops.convert_to_numpy(value) for i, value in enumerate(model.optimizer.variables)},
)
whole = {name: data[name] for name in ("source_ids", "target_ids")}
losses = model.fit(whole, data["labels"], batch_size=16, shuffle=False, verbose=0).history["loss"]
print(json.dumps({"loss": losses[0], "paths": [weight.path for weight in model.weights]}))
"""


def test_saved_here_and_resumed_in_a_fresh_process(tmp_path):
    """Without dropout, whose random states Keras does not save."""
    model = kt.models.transformer(12, 12, **SMALL, norm_position="sandwich", shared_embedding=True, dropout=0.0)
    model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data, labels = reverse_task()
    model.fit(data, labels, batch_size=16, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", **data, labels=labels)
    kept = [np.array(value) for value in model.get_weights()]
    of_optimizer = [np.array(ops.convert_to_numpy(value)) for value in model.optimizer.variables]
    output = as_numpy(model(inputs(data["source_ids"][:2], data["target_ids"][:2])))
    expected = model.fit(data, labels, batch_size=16, shuffle=False, verbose=0).history["loss"][0]

    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)],
        env={**os.environ, "KERAS_BACKEND": BACKEND},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    fresh = np.load(tmp_path / "fresh.npz")
    assert answer["paths"] == [weight.path for weight in model.weights]
    np.testing.assert_array_equal(fresh["output"], output)
    for i, value in enumerate(kept):
        np.testing.assert_array_equal(fresh[f"weight_{i}"], value, err_msg=answer["paths"][i])
    assert len(of_optimizer) > len(kept)
    for i, value in enumerate(of_optimizer):
        np.testing.assert_array_equal(fresh[f"optimizer_{i}"], value)
    assert abs(answer["loss"] - expected) <= 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shared_embedding": True}, "`shared_embedding` needs one vocabulary.*=20.*=17"),
        ({"num_heads": 3}, "num_heads=3 for a width of 8.* 6 and 9"),
        ({"norm_position": "none"}, "`norm_position` must be one of"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_dropout": -0.5}, "`dropout` must be a rate"),
        ({"depth": (1, 2, 3)}, "`depth` must be .*\\(1, 2, 3\\)"),
        ({"depth": 0}, "`depth` must be .*0"),
    ],
    ids=str,
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        kt.models.transformer(20, 17, **{**SMALL, **arguments})


def test_hidden_activation_and_dropout_reach_the_blocks():
    model = kt.models.transformer(20, 17, **SMALL, activation="silu", dropout=0.2, attention_dropout=0.1)
    blocks = [layer for layer in model.layers if isinstance(layer, kt.layers.EncoderBlock | kt.layers.DecoderBlock)]
    assert len(blocks) == 2
    for block in blocks:
        assert block.dropout == 0.2 and block.self_attention.dropout == 0.1
        assert block.feed_forward.activation is keras.activations.silu and block.feed_forward.hidden_dim == 16
    drawn = [as_numpy(model(inputs(), training=True)) for _ in range(2)]
    assert not np.array_equal(*drawn)
