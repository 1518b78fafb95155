"""Blocks against their parts, called one after the other."""

import itertools

import keras
import numpy as np
import pytest
from harness import as_numpy, lengths, random
from keras import ops

from keras_transformer.layers import (
    CrossAttention,
    DecoderBlock,
    EncoderBlock,
    FeedForward,
    MultiHeadSelfAttention,
    RelativePositionBias,
    RotaryEmbedding,
)
from keras_transformer.layers.cloning import clone_layer

X, CONTEXT = random(2, 5, 8), random(2, 7, 12, seed=1)
MASK, CONTEXT_MASK = lengths(5, 3, size=5), lengths(7, 4, size=7)


def by_hand(block, x, context=None):
    """The block's figure, sublayer by sublayer."""
    steps = [("self_attention", lambda x: block.self_attention(x, mask=MASK))]
    if context is not None:
        steps.append(("cross_attention", lambda x: block.cross_attention(x, context, context_mask=CONTEXT_MASK)))
    steps.append(("feed_forward", block.feed_forward))
    for name, sublayer in steps:
        norm = getattr(block, f"{name}_norm")
        scale = 1.0 if block.layer_scale is None else ops.convert_to_tensor(getattr(block, f"{name}_scale"))
        if block.norm_position == "pre":
            x = x + scale * sublayer(norm(x))
        elif block.norm_position == "post":
            x = norm(x + scale * sublayer(x))
        else:
            x = x + scale * getattr(block, f"{name}_post_norm")(sublayer(norm(x)))
    return as_numpy(x)


@pytest.mark.parametrize("layer_scale", [None, 0.2])
@pytest.mark.parametrize("norm_position", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "decoder with context"])
def test_blocks_are_their_parts_in_order(kind, norm_position, layer_scale):
    options = {"norm_position": norm_position, "layer_scale": layer_scale}
    if kind == "encoder":
        block, rest, masks = EncoderBlock(2, 16, **options), (), {}
    else:
        cross = {"cross_attention": 2} if "context" in kind else {}
        block = DecoderBlock(2, 16, **cross, **options)
        rest, masks = ((CONTEXT,), {"context_mask": CONTEXT_MASK}) if cross else ((), {})
    output = block(X, *rest, mask=MASK, **masks)
    for i, weight in enumerate(block.weights):  # Norms and layer scales start the same for all features.
        if len(weight.shape) == 1:
            weight.assign(random(*weight.shape, seed=i))
    output = block(X, *rest, mask=MASK, **masks)
    np.testing.assert_allclose(as_numpy(output), by_hand(block, ops.convert_to_tensor(X), *rest), atol=1e-5)


@pytest.mark.parametrize(
    ("block", "causal"),
    [
        (EncoderBlock(2, 16), False),
        (DecoderBlock(2, 16, 4), True),
        (DecoderBlock(MultiHeadSelfAttention(2), 16), False),
    ],
    ids=["encoder", "decoder", "as handed in"],
)
def test_numbers_are_short_for_layers(block, causal):
    assert type(block.self_attention) is MultiHeadSelfAttention and block.self_attention.num_heads == 2
    assert block.self_attention.causal is causal
    assert type(block.feed_forward) is FeedForward and block.feed_forward.hidden_dim == 16
    assert type(block.self_attention_norm) is keras.layers.LayerNormalization
    if getattr(block, "cross_attention", None) is not None:
        assert type(block.cross_attention) is CrossAttention and block.cross_attention.num_heads == 4


@pytest.mark.parametrize(
    ("norm_position", "norms"), [("pre", ["_norm"]), ("post", ["_norm"]), ("sandwich", ["_norm", "_post_norm"])]
)
def test_weights_are_named_after_the_sublayers(norm_position, norms):
    block = DecoderBlock(2, 16, 2, norm_position=norm_position, layer_scale=0.1, name="block")
    block.build(X.shape, CONTEXT.shape)
    sublayers = ["self_attention", "cross_attention", "feed_forward"]
    expected = {f"{name}{norm}" for name in sublayers for norm in ["", "_scale", *norms]}
    assert {weight.path.split("/")[1] for weight in block.weights} == expected
    assert all(weight.path.startswith("block/") for weight in block.weights)


@pytest.mark.parametrize("seeded", [False, True])
def test_blocks_made_of_the_same_layers_share_nothing(seeded):
    if seeded:
        keras.utils.set_random_seed(11)
    attention = MultiHeadSelfAttention(2, position=RelativePositionBias(2), dropout=0.5)
    feed_forward, norm = FeedForward(16, dropout=0.5), keras.layers.RMSNormalization()
    blocks = [EncoderBlock(attention, feed_forward, norm=norm, dropout=0.5) for _ in range(3)]
    for block in blocks:
        block.build(X.shape)
    assert not attention.built and not feed_forward.built and not norm.built
    variables = [variable for block in blocks for variable in block.variables]
    assert len({id(variable) for variable in variables}) == len(variables)
    drawn = [as_numpy(variable) for variable in variables if len(variable.shape) == 2]
    for first, second in itertools.combinations(drawn, 2):
        assert first.shape != second.shape or not np.array_equal(first, second)
    for block in blocks[1:]:  # The same weights, and yet each drops its own.
        block.set_weights(blocks[0].get_weights())
    outputs = [as_numpy(block(X)) for block in blocks]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    outputs = [as_numpy(block(X, training=True)) for block in blocks]
    assert not np.array_equal(outputs[0], outputs[1]) and not np.array_equal(outputs[1], outputs[2])


def test_stochastic_depth_skips_sublayers_for_whole_rows():
    block = EncoderBlock(2, 16, drop_path=0.5)
    x = np.repeat(random(1, 5, 8), 64, axis=0)
    block.build(x.shape)
    by_attention = as_numpy(block.self_attention(block.self_attention_norm(x)))[0]
    output = as_numpy(block(x, training=True))
    possible = []
    for attention in (0, 2):  # What is kept is doubled.
        between = x[:1] + attention * by_attention
        by_feed_forward = as_numpy(block.feed_forward(block.feed_forward_norm(between)))
        possible += [between + feed_forward * by_feed_forward for feed_forward in (0, 2)]
    found = [next(i for i, y in enumerate(possible) if np.allclose(row, y[0], atol=1e-4)) for row in output]
    assert set(found) == {0, 1, 2, 3}
    np.testing.assert_array_equal(as_numpy(block(x)), as_numpy(block(x, training=False)))


def test_layer_scale_starts_as_given_and_is_trained():
    block = EncoderBlock(2, 16, layer_scale=1e-6)
    np.testing.assert_allclose(as_numpy(block(X)), X, atol=1e-4)
    scales = [weight for weight in block.trainable_weights if weight.path.endswith("_scale")]
    assert len(scales) == 2
    for scale in scales:
        np.testing.assert_allclose(as_numpy(scale), np.full(8, 1e-6, "float32"))


def test_a_layer_of_ones_own_can_be_the_attention():
    """Whatever takes `mask`, `attention_mask`, `attention_bias` and `training` can stand in."""

    @keras.saving.register_keras_serializable(package="tests")
    class Mean(keras.layers.Layer):
        def build(self, x_shape):
            pass

        def call(self, x, mask=None, attention_mask=None, attention_bias=None, training=None):
            return ops.mean(x, axis=1, keepdims=True) + 0 * x

    block = EncoderBlock(Mean(), keras.layers.Dense(8))
    assert tuple(block(X).shape) == (2, 5, 8)
    revived = EncoderBlock.from_config(block.get_config())
    assert type(revived.self_attention) is Mean


@pytest.mark.parametrize("global_policy", ["float32", "mixed_bfloat16", "float16"])
@pytest.mark.parametrize(
    ("policy", "expected"), [(None, None), ("bfloat16", "bfloat16"), ("float32", "float32")], ids=str
)
def test_parts_follow_the_dtype_of_the_whole(global_policy, policy, expected):
    keras.config.set_dtype_policy(global_policy)
    attention = MultiHeadSelfAttention(2, position=RotaryEmbedding(), query_key_norm=keras.layers.RMSNormalization())
    block = EncoderBlock(attention, keras.layers.Dense(8), dtype=policy)
    block.build(X.shape)
    for part in block._flatten_layers():
        assert part.dtype_policy.name == (expected or global_policy), part.path


def test_a_part_keeps_a_policy_of_its_own_wherever_it_is_loaded(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    inputs = keras.Input((5, 8))
    norm = keras.layers.LayerNormalization(dtype="float32")
    model = keras.Model(inputs, EncoderBlock(2, 16, norm=norm, name="block")(inputs))
    expected = as_numpy(model(X))
    policies = [part.dtype_policy.name for part in model.get_layer("block")._flatten_layers()]
    assert {"float32", "mixed_bfloat16"} == set(policies)
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [part.dtype_policy.name for part in loaded.get_layer("block")._flatten_layers()] == policies
    np.testing.assert_array_equal(as_numpy(loaded(X)), expected)


def test_cloning_takes_a_layer_or_what_describes_one():
    layer = keras.layers.Dense(3, activation="relu")
    policy = keras.config.dtype_policy()
    for source in (layer, keras.saving.serialize_keras_object(layer)):
        clone = clone_layer(source, "part", policy, "feed_forward")
        assert clone is not layer and clone.name == "part" and clone.units == 3 and not clone.built
        assert clone.activation is keras.activations.relu
