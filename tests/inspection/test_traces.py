"""Traces, held to numpy written out here, to what models predict, and to themselves where a number is altered."""

import importlib.util
import pathlib
import re

import keras
import numpy as np
import pytest
from keras import ops

import keras_transformer as kt
from keras_transformer.layers import (
    AlibiBias,
    AttentionSinks,
    ClampedSwiGLU,
    DecoderBlock,
    EncoderBlock,
    FeedForward,
    MixtureOfExperts,
    MultiHeadSelfAttention,
    PositionalEmbedding,
    RelativePositionBias,
    RotaryEmbedding,
    SoftCap,
)

IDS = np.array([[3, 1, 4, 1, 5, 0], [9, 2, 6, 5, 3, 5]], "int32")
REAL = IDS != 0


def language_model(block, dtype=None, norm=None):
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    x = keras.layers.Embedding(10, 8, mask_zero=True, name="embedding", dtype=dtype)(tokens)
    x = PositionalEmbedding(name="position", dtype=dtype)(x)
    x = block(x)
    x = x if norm is None else norm(x)
    return keras.Model(tokens, keras.layers.Dense(10, name="logits", dtype=dtype)(x))


def randomized(model, scale=0.5):
    """Also biases, gains and tables are such that a step without them would be seen."""
    random = np.random.default_rng(0)
    for variable in model.weights:
        if "seed_generator" not in variable.path:
            variable.assign(random.normal(0, scale, variable.shape))
    return model


def rms():
    return keras.layers.RMSNormalization(epsilon=1e-5)


BLOCKS = {
    "pre-norm": lambda: EncoderBlock(2, 16, name="block"),
    "post-norm": lambda: EncoderBlock(2, 16, norm_position="post", name="block"),
    "sandwich, layer scale": lambda: DecoderBlock(2, 16, norm_position="sandwich", layer_scale=0.5, name="block"),
    "grouped, rotary, gated": lambda: DecoderBlock(
        MultiHeadSelfAttention(4, num_key_value_heads=2, causal=True, position=RotaryEmbedding(), query_key_norm=rms()),
        FeedForward(16, "silu", gated=True, use_bias=False),
        norm=rms(),
        name="block",
    ),
    "rotary, interleaved, in part": lambda: DecoderBlock(
        MultiHeadSelfAttention(2, causal=True, position=RotaryEmbedding(dim=2, interleaved=True)),
        FeedForward(16, kt.layers.gelu_tanh),
        name="block",
    ),
    "rotary, stretched": lambda: DecoderBlock(
        MultiHeadSelfAttention(
            2,
            causal=True,
            position=RotaryEmbedding(scaling={"rope_type": "linear", "factor": 4.0}),
            softmax=SoftCap(2.0),
        ),
        FeedForward(16, ClampedSwiGLU(), gated=True),
        name="block",
    ),
    "relative bias": lambda: EncoderBlock(
        MultiHeadSelfAttention(2, position=RelativePositionBias(2, 8, 16)), 16, name="block"
    ),
    "linear bias, window": lambda: DecoderBlock(
        MultiHeadSelfAttention(2, causal=True, sliding_window=2, position=AlibiBias(2)),
        FeedForward(16, "relu"),
        name="block",
    ),
    "sinks, experts": lambda: DecoderBlock(
        MultiHeadSelfAttention(2, causal=True, softmax=AttentionSinks(2)), MixtureOfExperts(4, 12), name="block"
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_step_is_recomputed_and_the_last_is_the_prediction(name):
    model = randomized(language_model(BLOCKS[name](), norm=rms()))
    expected = model.predict(IDS, verbose=0)
    trace = kt.inspection.trace(model, IDS)
    np.testing.assert_allclose(trace["logits/output"][REAL], expected[REAL], atol=1e-5)
    result = trace.verify()
    assert result.given == ["token_ids/input"] and not result.unknown
    assert len(result.recomputed) + 1 == len(trace)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_step_that_was_altered_is_named(name):
    trace = kt.inspection.trace(randomized(language_model(BLOCKS[name]())), IDS)
    for path in trace.verify().recomputed:
        altered = np.array(trace[path])
        finite, is_float = np.isfinite(altered), altered.dtype.kind == "f"
        altered[finite] = altered[finite] + 0.01 if is_float else altered[finite] == 0
        with pytest.raises(ValueError, match=f"^{path} differs"):
            trace.verify({path: altered})


def layer_norm(x, layer):
    gain, shift = (ops.convert_to_numpy(part) for part in (layer.gamma, layer.beta))
    mean = x.sum(-1, keepdims=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdims=True) / x.shape[-1]
    return (x - mean) / (variance + layer.epsilon) ** 0.5 * gain + shift


DOUBLE = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras itself computes in float32 here")


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), pytest.param("float64", 1e-12, marks=DOUBLE)])
def test_a_whole_walk_by_hand(dtype, tolerance):
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    source = keras.Input((None, 4), name="source")
    target = keras.Input((None, 4), name="target")
    context = EncoderBlock(2, FeedForward(6, "relu"), name="encoder")(source)
    decoder = DecoderBlock(2, FeedForward(6, "relu"), cross_attention=2, norm_position="post", name="decoder")
    model = randomized(keras.Model([source, target], decoder(target, context)), 0.2)
    random = np.random.default_rng(1)
    inputs = {"source": random.normal(size=(1, 3, 4)), "target": random.normal(size=(1, 2, 4))}
    trace = kt.inspection.trace(model, inputs)
    inputs = {name: value.astype(dtype).astype("float64") for name, value in inputs.items()}

    def weights(layer):
        return {
            name: [
                ops.convert_to_numpy(part)
                for part in (getattr(layer, attribute).kernel, getattr(layer, attribute).bias)
            ]
            for name, attribute in [(n, n) for n in ("query", "key", "value")] + [("output", "output_projection")]
        }

    def attention(layer, x, context, causal):
        parts, steps, output = weights(layer), {}, []
        query = x[0] @ parts["query"][0] + parts["query"][1]
        key = context[0] @ parts["key"][0] + parts["key"][1]
        value = context[0] @ parts["value"][0] + parts["value"][1]
        shares, joined = np.zeros((2, len(query), len(key))), np.zeros_like(query)
        for head in range(2):
            columns = slice(2 * head, 2 * head + 2)
            for i in range(len(query)):
                seen = range(i + 1 if causal else len(key))
                powers = [np.exp(query[i, columns] @ key[j, columns] / 2**0.5) for j in seen]
                for j in seen:
                    shares[head, i, j] = powers[j] / sum(powers)
                    joined[i, columns] += shares[head, i, j] * value[j, columns]
        output = joined @ parts["output"][0] + parts["output"][1]
        steps = {"query": query, "key": key, "value": value}
        steps = {name: array.reshape(1, -1, 2, 2).transpose(0, 2, 1, 3) for name, array in steps.items()}
        return {**steps, "weights": shares[None], "joined_heads": joined[None], "output": output[None]}

    def feed_forward(layer, x):
        up = x @ ops.convert_to_numpy(layer.up.kernel) + ops.convert_to_numpy(layer.up.bias)
        hidden = up * (up > 0)
        return {
            "up": up,
            "hidden": hidden,
            "output": hidden @ ops.convert_to_numpy(layer.down.kernel) + ops.convert_to_numpy(layer.down.bias),
        }

    def same(prefix, steps):
        for name, array in steps.items():
            np.testing.assert_allclose(trace[f"{prefix}/{name}"], array, rtol=0, atol=tolerance, err_msg=name)

    encoder, decoder = model.get_layer("encoder"), model.get_layer("decoder")
    x = inputs["source"]
    normed = layer_norm(x, encoder.self_attention_norm)
    steps = attention(encoder.self_attention, normed, normed, False)
    same("encoder/self_attention", steps)
    x = x + steps["output"]
    inner = feed_forward(encoder.feed_forward, layer_norm(x, encoder.feed_forward_norm))
    same("encoder/feed_forward", inner)
    context = x + inner["output"]
    same("encoder", {"self_attention_norm": normed, "self_attention_residual": x, "feed_forward_residual": context})
    x = inputs["target"]
    steps = attention(decoder.self_attention, x, x, True)
    same("decoder/self_attention", steps)
    x = layer_norm(x + steps["output"], decoder.self_attention_norm)
    steps = attention(decoder.cross_attention, x, context, False)
    same("decoder/cross_attention", steps)
    x = layer_norm(x + steps["output"], decoder.cross_attention_norm)
    inner = feed_forward(decoder.feed_forward, x)
    same("decoder/feed_forward", inner)
    same("decoder", {"feed_forward_norm": layer_norm(x + inner["output"], decoder.feed_forward_norm)})
    trace.verify(tolerance=tolerance)


def weights_of(layer):
    return {name: ops.convert_to_numpy(getattr(layer, name).kernel) for name in ("query", "key", "value")}


def close(trace, steps, width):
    """To 1e-6 where the width is 16 or less, and else to 1e-5 of the largest number."""
    for path, array in steps.items():
        tolerance = 1e-6 if width <= 16 else 1e-5 * np.abs(array).max()
        np.testing.assert_allclose(trace[path], array, rtol=0, atol=tolerance, err_msg=path)


@pytest.mark.parametrize("head", [4, 32])
def test_grouped_heads_that_turn_and_a_gate_by_hand(head):
    width = 4 * head
    attention = MultiHeadSelfAttention(
        4, num_key_value_heads=2, causal=True, position=RotaryEmbedding(100.0), use_bias=False
    )
    block = DecoderBlock(attention, FeedForward(6, "silu", gated=True, use_bias=False), norm=rms(), name="block")
    x_input = keras.Input((None, width), name="x")
    model = randomized(keras.Model(x_input, block(x_input)), 0.8 / width**0.5)
    x = np.random.default_rng(1).normal(size=(1, 5, width)).astype("float32")
    trace = kt.inspection.trace(model, x)

    def rms_norm(x, layer):
        square = (x * x).sum(-1, keepdims=True) / x.shape[-1]
        return x / (square + 1e-5) ** 0.5 * ops.convert_to_numpy(layer.scale)

    def turned(vector, position):  # The first half of a head is paired with the second.
        result, half = np.zeros(head), head // 2
        for pair in range(half):
            angle = position * 100.0 ** (-pair / half)
            one, other = vector[pair], vector[pair + half]
            result[pair] = one * np.cos(angle) - other * np.sin(angle)
            result[pair + half] = other * np.cos(angle) + one * np.sin(angle)
        return result

    x = x.astype("float64")
    normed = rms_norm(x, block.self_attention_norm)[0]
    parts = {name: normed @ kernel for name, kernel in weights_of(block.self_attention).items()}
    joined, shares = np.zeros((5, width)), np.zeros((1, 4, 5, 5))
    rotated = np.zeros((1, 4, 5, head))
    for h in range(4):
        own, shared = (slice(head * g, head * (g + 1)) for g in (h, h // 2))
        for i in range(5):
            rotated[0, h, i] = turned(parts["query"][i, own], i)
            scores = [rotated[0, h, i] @ turned(parts["key"][j, shared], j) / head**0.5 for j in range(i + 1)]
            powers = np.exp(scores - np.max(scores))
            shares[0, h, i, : i + 1] = powers / powers.sum()
            joined[i, own] = shares[0, h, i, : i + 1] @ parts["value"][: i + 1, shared]
    after = x + joined @ ops.convert_to_numpy(block.self_attention.output_projection.kernel)
    inner = rms_norm(after, block.feed_forward_norm)
    up, gate = (inner @ ops.convert_to_numpy(getattr(block.feed_forward, name).kernel) for name in ("up", "gate"))
    hidden = gate / (1 + np.exp(-gate)) * up
    output = after + hidden @ ops.convert_to_numpy(block.feed_forward.down.kernel)
    close(
        trace,
        {
            "block/self_attention/rotated_query": rotated,
            "block/self_attention/weights": shares,
            "block/self_attention/joined_heads": joined[None],
            "block/self_attention_residual": after,
            "block/feed_forward/up": up,
            "block/feed_forward/gate": gate,
            "block/feed_forward/hidden": hidden,
            "block/feed_forward_residual": output,
        },
        width,
    )


def test_a_relative_bias_by_hand():
    # Four buckets, two for either direction: of those before, the token itself and all others.
    attention = MultiHeadSelfAttention(2, position=RelativePositionBias(2, 4, 8), use_bias=False, name="attention")
    x_input = keras.Input((None, 4), name="x")
    model = randomized(keras.Model(x_input, attention(x_input)))
    x = np.random.default_rng(1).normal(size=(1, 4, 4)).astype("float32")
    trace = kt.inspection.trace(model, x)
    table = ops.convert_to_numpy(attention.position.bias_table)
    bias = np.zeros((1, 2, 4, 4))
    for i in range(4):
        for j in range(4):
            bias[0, :, i, j] = table[3 if j > i else min(i - j, 1)]
    parts = {name: x[0].astype("float64") @ kernel for name, kernel in weights_of(attention).items()}
    scores = np.stack([parts["query"][:, c] @ parts["key"][:, c].T for c in (slice(0, 2), slice(2, 4))])[None]
    biased = scores / 2**0.5 + bias
    shares = np.exp(biased) / np.exp(biased).sum(-1, keepdims=True)
    steps = {
        "bias": bias,
        "scores": scores,
        "scaled_scores": scores / 2**0.5,
        "biased_scores": biased,
        "weights": shares,
    }
    close(trace, {f"attention/{name}": array for name, array in steps.items()}, 4)


def test_the_readme_shows_what_is_printed():
    root = pathlib.Path(__file__).parents[2]
    specification = importlib.util.spec_from_file_location("small_model", root / "docs/chapters/small_model.py")
    small = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(small)
    (shown,) = re.findall(r"```text\n(attention\n.*?)```", (root / "README.md").read_text(), re.DOTALL)
    printed = str(small.trace_of("the river bank")).splitlines()
    assert len(shown.splitlines()) > 10 and not set(shown.splitlines()) - set(printed)


def test_rows_of_weights_and_what_is_masked():
    trace = kt.inspection.trace(language_model(DecoderBlock(2, 16, name="block")), np.array([[0, 3, 3], [4, 4, 0]]))
    weights, scores = trace["block/self_attention/weights"], trace["block/self_attention/masked_scores"]
    np.testing.assert_array_equal(weights[0, :, 0], 0)  # Padding before all else may attend to nothing.
    np.testing.assert_allclose(weights[0, :, 1:].sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(weights[1].sum(-1), 1, atol=1e-6)
    assert (weights[np.isneginf(scores)] == 0).all() and np.isneginf(scores).any()
    lines = trace.token(0).splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith("  weights ")]
    assert [line.split() for line in lines[start + 2 : start + 4]] == [
        ["head", "0", "0", "0", "0"],
        ["head", "1", "0", "0", "0"],
    ]


def test_shared_and_nested_layers_have_paths_of_their_own():
    block = EncoderBlock(2, 16, name="block")
    inner_input = keras.Input((None, 8))
    inner = keras.Model(inner_input, block(block(inner_input)), name="inner")
    tower = keras.Sequential(
        [EncoderBlock(2, 16, name="block"), keras.layers.Dense(8, "relu", name="dense")], name="tower"
    )
    x = keras.Input((None, 8), name="x")
    model = keras.Model(x, tower(inner(inner(x))))
    trace = kt.inspection.trace(model, np.ones((1, 3, 8), "float32"))
    places = list(dict.fromkeys(path.rsplit("/", 2)[0] for path in trace if path.endswith("attention/weights")))
    assert places == ["inner/block", "inner/block@1", "inner@1/block", "inner@1/block@1", "tower/block"]
    assert "tower/dense/output" in trace and not trace.verify().unknown
    np.testing.assert_allclose(
        list(trace.values())[-1], model.predict(np.ones((1, 3, 8), "float32"), verbose=0), atol=1e-5
    )


def test_models_of_every_kind_are_traced():
    random = np.random.default_rng(0)
    models = {
        "transformer": (
            kt.models.transformer(11, 11, dim=8, depth=1, num_heads=2, hidden_dim=16),
            {"source_ids": IDS, "target_ids": IDS[:, :4]},
        ),
        "text": (kt.models.text_classifier(11, 3, dim=8, depth=1, num_heads=2, hidden_dim=16), IDS),
        "language": (kt.models.causal_lm(11, dim=8, depth=1, num_heads=2, hidden_dim=16), IDS),
        "image": (
            kt.models.vision_transformer((8, 8, 3), 4, patch_size=4, dim=8, depth=1, num_heads=2, hidden_dim=16),
            random.normal(size=(2, 8, 8, 3)).astype("float32"),
        ),
    }
    for name, (model, inputs) in models.items():
        trace = kt.inspection.trace(model, inputs)
        expected = model.predict(inputs, verbose=0)
        np.testing.assert_allclose(list(trace.values())[-1], expected, atol=1e-5, err_msg=name)
        result = trace.verify()
        assert len(result.recomputed) > 3 * (len(result.unknown) + len(result.given))
        maps = kt.inspection.attention_maps(model, inputs)
        assert {f"{path}/weights" for path in maps} == {path for path in trace if path.endswith("/weights")}
        for path, weights in maps.items():
            np.testing.assert_array_equal(weights, trace[f"{path}/weights"])
        assert max(map(len, str(trace).splitlines())) <= 100


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.block = EncoderBlock(2, 16, name="block")

    def call(self, x):
        return keras.ops.mean(self.block(x), axis=1)


def test_of_a_subclassed_model_the_layers_are_seen():
    model = Subclassed()
    trace = kt.inspection.trace(model, np.ones((1, 3, 8), "float32"))
    assert all("block" in path for path in trace) and len(trace.verify().recomputed) >= 12


def test_a_reloaded_model_has_the_same_trace(tmp_path):
    model = randomized(language_model(BLOCKS["grouped, rotary, gated"]()))
    model.save(tmp_path / "model.keras")
    before, after = (kt.inspection.trace(x, IDS) for x in (model, keras.saving.load_model(tmp_path / "model.keras")))
    assert list(before) == list(after)
    for path in before:
        np.testing.assert_array_equal(before[path], after[path])


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_is_verified_as_far_as_it_goes(dtype):
    keras.config.set_dtype_policy(dtype)
    model = language_model(DecoderBlock(2, 16, name="block"))
    trace = kt.inspection.trace(model, IDS)
    assert len(trace.verify().recomputed) > 20
    with pytest.raises(ValueError, match="differs"):
        trace.verify(tolerance=1e-7)


def test_a_trace_leaves_no_mark():
    found = []
    for traced in (False, True):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        model = language_model(DecoderBlock(2, 16, dropout=0.1, name="block"))
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        if traced:
            kt.inspection.trace(model, IDS)
        loss = model.train_on_batch(IDS, IDS)
        found.append((loss, [ops.convert_to_numpy(x) for x in model.variables], model.get_config()))
    (loss, weights, config), (other_loss, other_weights, other_config) = found
    assert loss == other_loss and config["layers"] == other_config["layers"]
    for one, other in zip(weights, other_weights, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch has no such program")
@pytest.mark.parametrize("training", [False, True])
def test_without_a_scope_the_compiled_program_has_nothing_of_it(training, monkeypatch):
    model = language_model(BLOCKS["grouped, rotary, gated"]())

    def program():
        def run(x):
            return ops.sum(model(x, training=training))

        if keras.backend.backend() == "jax":
            import jax

            def loss(weights, x):
                outputs, _ = model.stateless_call(weights, [], x, training=training)
                return ops.sum(outputs)

            weights = [variable.value for variable in model.trainable_variables]
            return jax.jit(jax.value_and_grad(loss)).lower(weights, IDS).as_text()
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def step(x):
            with tf.GradientTape() as tape:
                loss = run(x)
            return loss, tape.gradient(loss, [variable.value for variable in model.trainable_variables])

        text = step.experimental_get_compiler_ir(tf.constant(IDS))(stage="hlo")
        return re.sub(r"inference_step_\d+__\.\d+", "step", text)  # Functions are counted.

    expected = program()
    kt.inspection.trace(model, IDS)
    assert program() == expected
    monkeypatch.setattr(kt.scopes, "record", lambda layer, name, value, *sources: value)
    assert program() == expected and len(expected) > 1000


def test_tokens_are_named_and_twice_the_same_word_is_two_columns():
    model = kt.models.transformer(11, 11, dim=8, depth=1, num_heads=2, hidden_dim=16)
    inputs = {"source_ids": np.array([[3, 3, 4]]), "target_ids": np.array([[1, 2]])}
    names = {"source_ids": ["the", "the", "</script><b>"], "target_ids": ["<s>", "das"]}
    trace = kt.inspection.trace(model, inputs, tokens=names)
    text = str(trace)
    assert text.splitlines()[0].endswith("position 1 of 2 in target_ids: 'das'")
    assert ["the", "the", "</scrip…"] in [line.split() for line in text.splitlines()]
    assert "position 0 of 3 in source_ids: 'the'" in trace.token(0, of="source_ids")
    assert "probabilities" in text and "probabilities" not in str(trace.layer("decoder_block_0"))
    assert list(trace.layer("decoder_block_0/cross_attention"))[0] == "decoder_block_0/cross_attention/query"


def test_a_trace_cannot_be_written_to():
    trace = kt.inspection.trace(language_model(EncoderBlock(2, 16, name="block")), IDS)
    with pytest.raises(ValueError, match="read-only"):
        trace["logits/output"][0] = 1
    with pytest.raises(TypeError):
        trace["logits/output"] = 1


def test_bad_input():
    model = language_model(EncoderBlock(2, 16, name="block"))
    with pytest.raises(ValueError, match="MultiHeadSelfAttention, CrossAttention, FeedForward"):
        kt.inspection.trace(keras.Sequential([keras.layers.Dense(2)]), np.ones((1, 2)))
    with pytest.raises(ValueError, match="received 2 for an input of shape"):
        kt.inspection.trace(model, IDS, tokens=["a", "b"])
    with pytest.raises(ValueError, match="`tokens` must name inputs"):
        kt.inspection.trace(model, IDS, tokens={"ids": ["a"] * 6})
    trace = kt.inspection.trace(model, IDS)
    with pytest.raises(KeyError, match="block/self_attention/weights"):
        trace["block/attention/weights"]
    with pytest.raises(KeyError, match="block/self_attention"):
        trace.layer("block/attention")
    with pytest.raises(IndexError, match="one of the 6 positions of token_ids"):
        trace.token(6)
    with pytest.raises(ValueError, match="must hold"):
        kt.inspection.trace(kt.models.transformer(9, 9, dim=8, depth=1, num_heads=2, hidden_dim=8), {"source_ids": IDS})


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch compiles nothing here")
def test_inside_a_compiled_function_there_are_no_numbers():
    model = language_model(EncoderBlock(2, 16, name="block"))
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        compiled = tf.function(lambda x: kt.inspection.trace(model, x) and x)
    else:
        import jax

        compiled = jax.jit(lambda x: kt.inspection.trace(model, x) and x)
    with pytest.raises(RuntimeError, match="inside a compiled function"):
        compiled(ops.convert_to_tensor(IDS))
