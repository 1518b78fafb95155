"""Rematerialization: the same outputs, gradients, states and losses, dropout included, with nothing kept between."""

import keras
import numpy as np
import pytest
from harness import BACKEND, as_numpy, gradients, lengths, random
from keras import ops

import keras_transformer as kt
from keras_transformer.layers import DecoderBlock, EncoderBlock, FeedForward, MixtureOfExperts, MultiHeadSelfAttention
from keras_transformer.ops.looping import on_cpu

X, CONTEXT = random(2, 5, 8), random(2, 7, 12, seed=1)
BIAS = random(1, 2, 5, 5, seed=2)
MASK, CONTEXT_MASK = lengths(5, 3, size=5), lengths(7, 3, size=7)


def encoder(**options):
    block = EncoderBlock(MultiHeadSelfAttention(2, dropout=0.3), FeedForward(16, dropout=0.3), dropout=0.3,
                         drop_path=0.3, layer_scale=0.5, **options)  # fmt: skip
    return block, lambda x, bias: block(x, mask=MASK, attention_bias=bias, training=True)


def decoder(**options):
    block = DecoderBlock(MultiHeadSelfAttention(2, causal=True, dropout=0.3), 16, 2, norm_position="sandwich",
                         dropout=0.3, **options)  # fmt: skip
    context = ops.convert_to_tensor(CONTEXT)
    return block, lambda x, bias: block(x, context, context_mask=CONTEXT_MASK, attention_bias=bias, training=True)


def experts(**options):
    """A loss of its own, and a norm whose states change in training."""
    norm = keras.layers.BatchNormalization()
    experts = MixtureOfExperts(4, 16, 2, load_balancing=0.1, router_jitter=0.1)
    block = EncoderBlock(2, experts, norm=norm, **options)
    return block, lambda x, bias: block(x, attention_bias=bias, training=True)


def trained(make, policy, **options):
    """What a step of training gives: loss, gradients of weights and inputs, and states after it."""
    keras.utils.set_random_seed(1)
    block, call = make(dtype=policy, **options)
    x, bias = keras.Variable(X), keras.Variable(BIAS)
    block(X, *([CONTEXT] if make is decoder else []))
    probe = ops.convert_to_tensor(random(*X.shape, seed=7))
    losses = []

    def loss():
        keras.utils.set_random_seed(2)  # The generator of torch, which its dropout draws from.
        value = ops.sum(ops.cast(call(x.value, bias.value), "float32") * probe) + sum(block.losses)
        if BACKEND != "jax":  # There it is traced, and what changes does not leave the trace.
            losses.append(float(value))
        return value

    found = gradients(loss, [*block.trainable_variables, x, bias])
    return [*losses, *found, *(as_numpy(state) for state in block.non_trainable_variables)]


@pytest.mark.parametrize(("make", "policy"), [(encoder, "float32"), (decoder, "mixed_bfloat16"), (experts, "float32")])
def test_gradients_states_and_losses_are_the_same(make, policy):
    for one, other in zip(trained(make, policy), trained(make, policy, remat=True), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-6)


def test_the_gradient_calls_the_layers_once_more():
    calls = []

    @keras.saving.register_keras_serializable(package="tests")
    class Counting(keras.layers.Dense):
        def call(self, x, training=None):
            calls.append(training)
            return super().call(x, training=training)

    traced_once = BACKEND == "jax" and not on_cpu(None)  # There JAX derives the second run from the trace of the first.
    for remat in (False, True):
        block = EncoderBlock(2, Counting(8), remat=remat)
        block(X)
        calls.clear()
        gradients(lambda block=block: ops.sum(block(X, training=True)), block.trainable_variables)
        assert calls == [True] * (2 if remat and not traced_once else 1)


def test_models_learn_the_same_and_keep_the_flag(tmp_path):
    ids = np.random.default_rng(0).integers(1, 50, (4, 12)).astype("int32")
    learned = []
    for remat in (False, True):
        keras.utils.set_random_seed(1)
        model = kt.models.causal_lm(50, dim=16, depth=1, num_heads=2, dropout=0.2, remat=remat)
        model.compile(keras.optimizers.SGD(0.1), kt.training.SmoothedCrossEntropy(0.0))
        keras.utils.set_random_seed(2)
        model.fit(ids[:, :-1], ids[:, 1:], epochs=2, verbose=0)
        learned.append(model.get_weights())
    for one, other in zip(*learned, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    model.save(tmp_path / "model.keras")
    for copy in (keras.models.load_model(tmp_path / "model.keras"), keras.models.clone_model(model)):
        assert [block.remat for block in copy.layers if isinstance(block, DecoderBlock)] == [True]
    generate = kt.generation.Generator(model, jit_compile=False).generate
    whole = np.array([[3, 4, 5]])
    for _ in range(3):  # Generating step by step is going on from the best.
        best = as_numpy(model(whole))[:, -1].argmax(-1)
        whole = np.concatenate([whole, best[:, None]], axis=1)
    assert generate({"token_ids": [[3, 4, 5]]}, 3).tolist() == whole[:, 3:].tolist()
    assert len(kt.inspection.attention_maps(model, {"token_ids": ids[:1]})) == 1


BUILDERS = {
    "image_captioner": ((8, 8, 1), 9, 4),
    "speech_recognizer": (9, 8),
    "text_classifier": (9, 2),
    "transformer": (9, 9),
    "vision_transformer": ((8, 8, 1), 2, 4),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_every_model_has_the_flag(name):
    for remat in (False, True):
        model = getattr(kt.models, name)(*BUILDERS[name], dim=8, depth=1, num_heads=2, hidden_dim=8, remat=remat)
        blocks = [block.remat for block in model.layers if isinstance(block, EncoderBlock | DecoderBlock)]
        assert blocks and all(flag is remat for flag in blocks)


def test_a_recording_in_training_is_whole():
    block = EncoderBlock(2, 16, remat=True)
    with kt.scopes.RecordingScope() as scope:
        block(X, training=True)
    assert any(path.endswith("weights") for path in scope.records)
