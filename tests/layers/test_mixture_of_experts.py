"""Experts against a loop over tokens in float64, and against the models that introduced them."""

import keras
import numpy as np
import pytest
from harness import BACKEND, as_numpy, compiled, gradients, lengths, random
from keras import ops

from keras_transformer.layers import ClampedSwiGLU, DecoderBlock, EncoderBlock, FeedForward, MixtureOfExperts
from keras_transformer.layers.mixture_of_experts import make_blocks
from keras_transformer.scopes import DecodingScope

X = random(2, 9, 8)


def drawn(layer, shape, seed=0):
    """`layer` built, with all its weights drawn anew, biases too."""
    layer.build(shape)
    layer.set_weights([random(*w.shape, seed=seed + i, scale=0.5) for i, w in enumerate(layer.weights)])
    return layer


def silu(x):
    return x / (1 + np.exp(-x))


def written_out(layer, x):
    """Token by token, each expert by itself."""

    def weight(name):
        value = getattr(layer, name, None)
        return None if value is None else as_numpy(value).astype("float64")

    def affine(x, name, expert):
        bias = weight(f"{name}_bias")
        return x @ weight(name)[expert] + (0 if bias is None else bias[expert])

    tokens = x.reshape(-1, x.shape[-1]).astype("float64")
    scores = tokens @ as_numpy(layer.router.kernel)
    if layer.router_bias:
        scores = scores + as_numpy(layer.router.bias)
    results = np.zeros_like(tokens)
    for n, token in enumerate(tokens):
        chosen = np.argsort(-scores[n])[: layer.top_k]
        weights = np.exp(scores[n, chosen] - scores[n].max())
        for expert, share in zip(chosen, weights / weights.sum(), strict=True):
            up = affine(token, "up", expert)
            hidden = silu(affine(token, "gate", expert)) * up if layer.gated else silu(up)
            results[n] += share * affine(hidden, "down", expert)
    return results.reshape(x.shape)


CONFIGS = [
    {"num_experts": 4, "hidden_dim": 6},
    {"num_experts": 3, "hidden_dim": 5, "top_k": 1, "gated": False},
    {"num_experts": 8, "hidden_dim": 6, "top_k": 3, "use_bias": True, "router_bias": True},
    {"num_experts": 40, "hidden_dim": 6, "use_bias": True},  # More than tokens times choices: one by one.
    {"num_experts": 2, "hidden_dim": 4, "use_bias": True, "gated": False},
    {"num_experts": 1, "hidden_dim": 4, "top_k": 1},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length", [1, 9, 200])
def test_each_token_takes_its_experts(config, training, length):
    x = random(2, length, 8, seed=length)
    layer = drawn(MixtureOfExperts(**config), x.shape)
    output = as_numpy(layer(x, training=training))
    np.testing.assert_allclose(output, written_out(layer, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_experts", [4, 40])
def test_inference_has_the_gradients_of_training(num_experts):
    layer = drawn(MixtureOfExperts(num_experts, 6, use_bias=True, router_bias=True), X.shape)
    probe = ops.convert_to_tensor(random(*X.shape, seed=9))
    variables = [*layer.trainable_weights, keras.Variable(X)]
    ways = [
        gradients(lambda training=training: ops.sum(layer(variables[-1] + 0, training=training) * probe), variables)
        for training in (False, True)
    ]
    for first, second in zip(*ways, strict=True):
        assert first.any()
        np.testing.assert_allclose(first, second, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("num_experts", [4, 40])
def test_compiled(num_experts):
    layer = drawn(MixtureOfExperts(num_experts, 6), X.shape)
    output = compiled(lambda x: layer(x, training=False))(ops.convert_to_tensor(X))
    np.testing.assert_allclose(as_numpy(output), written_out(layer, X), atol=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow traces functions for unknown lengths")
@pytest.mark.parametrize("jit", [False, True])
def test_unknown_lengths(jit):
    import tensorflow as tf

    layer = drawn(MixtureOfExperts(4, 6), X.shape)
    specification = tf.TensorSpec((None, None, 8))
    function = tf.function(lambda x: layer(x, training=False), input_signature=[specification], jit_compile=jit)
    for length in (1, 9, 60):
        x = random(2, length, 8, seed=length)
        np.testing.assert_allclose(as_numpy(function(x)), written_out(layer, x), atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_blocks_hold_every_row_once_and_one_expert_each(experts, size):
    for seed in range(5):
        # Some experts are chosen by nobody.
        chosen = (
            np.random.default_rng(seed).choice(experts, 11, p=[0.9] + [0.1 / (experts - 1)] * (experts - 1))
            if (experts > 1)
            else np.zeros(11, int)
        )
        found = make_blocks(ops.convert_to_tensor(chosen, dtype="int32"), 11, experts, size)
        block_expert, sources, places = (as_numpy(part) for part in found)
        assert sources.shape == (len(block_expert), size)
        np.testing.assert_array_equal(sources.reshape(-1)[places], np.arange(11))
        np.testing.assert_array_equal(block_expert[places // size], chosen)
        assert len(set(places.tolist())) == 11
        needed = sum(-(-count // size) for count in np.bincount(chosen))
        assert (block_expert >= 0).tolist() == [number < needed for number in range(len(block_expert))]


@pytest.mark.parametrize("num_experts", [4, 64])
def test_only_the_chosen_experts_count(num_experts):
    """What no token has chosen may hold anything, even what no number is."""
    layer = drawn(MixtureOfExperts(num_experts, 6, top_k=2), X.shape)
    x = X[:1, :1].repeat(20, axis=1)
    expected = written_out(layer, x)
    chosen = np.argsort(-(x[0, 0] @ as_numpy(layer.router.kernel)))[:2]
    for weight in (layer.up, layer.gate, layer.down):
        value = as_numpy(weight).copy()
        value[[expert for expert in range(num_experts) if expert not in chosen]] = np.nan
        weight.assign(value)
    np.testing.assert_allclose(as_numpy(layer(x)), expected, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balancing_is_the_loss_of_the_paper(masked, top_k):
    mask = lengths(9, 4, size=9) if masked else np.ones((2, 9), bool)
    layer = drawn(MixtureOfExperts(4, 6, top_k=top_k, load_balancing=0.1), X.shape)
    passed = {"mask": ops.convert_to_tensor(mask)} if masked else {}
    layer(X, **passed)
    assert layer.losses == []
    layer(X, training=True, **passed)
    (loss,) = layer.losses
    scores = (X @ as_numpy(layer.router.kernel))[mask]
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    chosen = np.argsort(-scores, axis=-1)[:, :top_k]
    share = np.array([(chosen == expert).any(axis=1).mean() for expert in range(4)])
    np.testing.assert_allclose(as_numpy(loss), 0.1 * 4 * (share * probabilities.mean(axis=0)).sum(), rtol=1e-5)


def test_equal_shares_cost_least():
    """One for each of a token's experts, and more where all tokens choose the same."""
    layer = MixtureOfExperts(4, 6, top_k=1, load_balancing=1.0)
    layer.build((4, 4))
    losses = []
    for x in (50 * np.eye(4), 50 * np.eye(4)[[0, 0, 0, 0]]):
        layer.router.kernel.assign(np.eye(4))
        layer(ops.convert_to_tensor(x, dtype="float32"), training=True)
        losses.append(float(as_numpy(layer.losses[0])))
    np.testing.assert_allclose(losses, [1, 4], rtol=1e-5)


@pytest.mark.parametrize("block", [EncoderBlock, DecoderBlock])
def test_the_loss_is_trained_in_a_block(block, tmp_path):
    """A model's loss has it, its gradient moves the router, and a loaded model computes the same."""
    inputs = keras.Input((None, 8))
    model = keras.Model(inputs, block(2, MixtureOfExperts(4, 6, load_balancing=1.0))(inputs))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    router = model.layers[-1].feed_forward.router.kernel
    before = as_numpy(router).copy()
    history = model.fit(X, as_numpy(model(X)), epochs=1, verbose=0)
    assert history.history["loss"][0] > 1.5  # The outputs are matched: what is left is 2 or more for top_k=2.
    assert not np.array_equal(as_numpy(router), before)
    assert model.evaluate(X, as_numpy(model(X)), verbose=0) < 1e-6
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(as_numpy(loaded(X)), as_numpy(model(X)))


@pytest.mark.parametrize("block", [EncoderBlock, DecoderBlock])
def test_a_block_keeps_padding_out_of_the_loss(block):
    mask = lengths(9, 4, size=9)
    padding = random(2, 9, 8, seed=3) * ~mask[..., None]
    layer = drawn(block(2, MixtureOfExperts(4, 6, load_balancing=1.0)), X.shape)
    losses = []
    for x in (X, X + 5 * padding):
        layer(x, mask=mask, training=True)
        losses.append(as_numpy(layer.losses[0]))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    layer(X, training=True)
    assert abs(as_numpy(layer.losses[0]) - losses[0]) > 1e-3


@pytest.mark.parametrize("num_experts", [4, 12])
def test_decoding_equals_the_whole(num_experts):
    layer = drawn(DecoderBlock(2, MixtureOfExperts(num_experts, 6)), X.shape)
    whole, cache = as_numpy(layer(X)), None
    for index in range(9):
        with DecodingScope(cache, index=index, max_length=None if cache else 9) as scope:
            output = layer(X[:, index : index + 1])
        cache = scope.cache
        np.testing.assert_allclose(as_numpy(output), whole[:, index : index + 1], atol=1e-4)


def test_jitter_acts_on_the_router_in_training_alone():
    layer = drawn(MixtureOfExperts(4, 6, top_k=4, router_jitter=0.5), X.shape)
    first, second = (as_numpy(layer(X, training=True)) for _ in range(2))
    assert not np.allclose(first, second, atol=1e-3)
    np.testing.assert_allclose(as_numpy(layer(X)), written_out(layer, X), atol=1e-5)
    # Where all experts are equal their weights do not matter, and jitter changes nothing.
    for weight in (layer.up, layer.gate, layer.down):
        weight.assign(np.repeat(as_numpy(weight)[:1], 4, axis=0))
    np.testing.assert_allclose(as_numpy(layer(X, training=True)), written_out(layer, X), atol=1e-5)


def test_weights_are_named_after_their_projections():
    layer = MixtureOfExperts(4, 6, use_bias=True, router_bias=True, name="experts")
    layer.build(X.shape)
    shapes = {
        "router/kernel": (8, 4),
        "router/bias": (4,),
        "up": (4, 8, 6),
        "up_bias": (4, 6),
        "gate": (4, 8, 6),
        "gate_bias": (4, 6),
        "down": (4, 6, 8),
        "down_bias": (4, 8),
    }
    assert {w.path: tuple(w.shape) for w in layer.weights} == {f"experts/{name}": s for name, s in shapes.items()}


def test_experts_begin_as_a_feed_forward_network_does():
    experts, single = MixtureOfExperts(4, 60), FeedForward(60, gated=True, use_bias=False)
    for layer in (experts, single):
        layer.build((None, None, 80))
    for name in ("up", "gate", "down"):
        spread, expected = (
            as_numpy(getattr(experts, name)).std(axis=(1, 2)),
            as_numpy(getattr(single, name).kernel).std(),
        )
        np.testing.assert_allclose(spread, expected, rtol=0.1)


@pytest.mark.parametrize("length", [1, 9])
def test_mixtral(length):
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = mixtral.MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = mixtral.MixtralSparseMoeBlock(config).eval()
    layer = drawn(MixtureOfExperts(4, 6, top_k=2, load_balancing=1.0), (None, None, 8))
    gate_up = np.concatenate([as_numpy(layer.gate), as_numpy(layer.up)], axis=-1).transpose(0, 2, 1)
    x = X[:, :length]
    with torch.no_grad():
        for parameter, value in (
            (block.gate.weight, as_numpy(layer.router.kernel).T),
            (block.experts.gate_up_proj, gate_up),
            (block.experts.down_proj, as_numpy(layer.down).transpose(0, 2, 1)),
        ):
            parameter.copy_(torch.tensor(value.copy()))
        expected = block(torch.tensor(x)).numpy()
        scores = torch.tensor(x.reshape(-1, 8) @ as_numpy(layer.router.kernel))
        mask = lengths(length, max(length - 4, 1), size=length)
        loss = mixtral.load_balancing_loss_func((scores,), 4, 2, torch.tensor(mask.astype("int64")))
    np.testing.assert_allclose(as_numpy(layer(x)), expected, atol=1e-5)
    layer(x, mask=ops.convert_to_tensor(mask), training=True)
    np.testing.assert_allclose(as_numpy(layer.losses[0]), loss.numpy(), rtol=1e-5)


@pytest.mark.parametrize("length", [1, 9])
def test_gpt_oss(length):
    torch = pytest.importorskip("torch")
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = gpt_oss.GptOssConfig(hidden_size=8, intermediate_size=6, num_local_experts=5, num_experts_per_tok=3)
    config._experts_implementation = "eager"
    config.swiglu_alpha, config.swiglu_limit = 1.702, 0.7
    block = gpt_oss.GptOssMLP(config).eval()
    activation = ClampedSwiGLU(1.702, 0.7)
    layer = MixtureOfExperts(5, 6, top_k=3, activation=activation, use_bias=True, router_bias=True)
    drawn(layer, (None, None, 8))
    taking_turns = [
        np.stack([as_numpy(gate), as_numpy(up)], axis=-1).reshape(*gate.shape[:-1], 12)
        for gate, up in ((layer.gate, layer.up), (layer.gate_bias, layer.up_bias))
    ]
    x = X[:, :length]
    with torch.no_grad():
        for parameter, value in (
            (block.router.weight, as_numpy(layer.router.kernel).T),
            (block.router.bias, as_numpy(layer.router.bias)),
            (block.experts.gate_up_proj, taking_turns[0]),
            (block.experts.gate_up_proj_bias, taking_turns[1]),
            (block.experts.down_proj, as_numpy(layer.down)),
            (block.experts.down_proj_bias, as_numpy(layer.down_bias)),
        ):
            parameter.copy_(torch.tensor(value.copy()))
        expected = block(torch.tensor(x))[0].numpy()
    np.testing.assert_allclose(as_numpy(layer(x)), expected, atol=1e-5)
    np.testing.assert_allclose(as_numpy(layer(x, training=True)), expected, atol=1e-5)
