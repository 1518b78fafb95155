"""Decoding token by token equals one call on the whole, and what a scope holds stays with those who opened it."""

import threading

import keras
import numpy as np
import pytest
from harness import as_numpy, case_id, compiled, lengths, pairs, random
from keras import ops

import keras_transformer as kt
from keras_transformer.layers import (
    AlibiBias,
    CrossAttention,
    DecoderBlock,
    EncoderBlock,
    MultiHeadSelfAttention,
    PositionalEmbedding,
    RelativePositionBias,
    RotaryEmbedding,
)
from keras_transformer.scopes import Branches, DecodingScope, RecordingScope

T, MAX_LENGTH, DIM = 7, 9, 8
NO_PADDING = np.ones((2, T), bool)
LEFT = np.arange(T) >= np.array([[0], [3]])
RIGHT_OF_PROMPT = np.ones((2, T), bool)
RIGHT_OF_PROMPT[1, 2:4] = False  # The prompt has four slots, of which the second row fills two.
PADDINGS = {"none": NO_PADDING, "left": LEFT, "right": RIGHT_OF_PROMPT}
POSITIONS = {
    "none": lambda: {},
    "rotary": lambda: {"position": RotaryEmbedding()},
    "rotary yarn": lambda: {
        "position": RotaryEmbedding(
            scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, interleaved=True
        )
    },
    "relative": lambda: {"position": RelativePositionBias(4, 8, 16, bidirectional=False)},
    "alibi": lambda: {"position": AlibiBias(4)},
}
CASES = pairs(
    position=tuple(POSITIONS),
    window=(None, 3),
    heads=(4, 2, 1),
    norm=(False, True),
    padding=tuple(PADDINGS),
    steps=((4, 1, 1, 1), (1, 3, 3), (4, 3), (7,)),
    given=("scope", "layer"),
)


def decode(call, steps, padding=None):
    """`call(start, stop)` piece by piece, each under a scope with the cache of the one before; the pieces joined."""
    pieces, cache, start = [], None, 0
    for step in steps:
        options = {"cache": cache, "index": start, "max_length": MAX_LENGTH}
        if padding is not None:
            options["padding_mask"] = ops.convert_to_tensor(padding[:, start : start + step])
        with DecodingScope(**options) as scope:
            pieces.append(as_numpy(call(start, start + step)))
        cache, start = scope.cache, start + step
    return np.concatenate(pieces, axis=1), cache


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_self_attention_step_by_step_equals_the_whole(case):
    layer = MultiHeadSelfAttention(
        4,
        num_key_value_heads=case["heads"],
        causal=True,
        sliding_window=case["window"],
        query_key_norm=keras.layers.RMSNormalization() if case["norm"] else None,
        **POSITIONS[case["position"]](),
    )
    x, padding = random(2, T, 16), PADDINGS[case["padding"]]
    expected = as_numpy(layer(x, mask=ops.convert_to_tensor(padding)))

    def call(start, stop):
        mask = ops.convert_to_tensor(padding[:, start:stop]) if case["given"] == "layer" else None
        return layer(x[:, start:stop], mask=mask)

    output, cache = decode(call, case["steps"], padding if case["given"] == "scope" else None)
    np.testing.assert_allclose(output[padding], expected[padding], atol=1e-4)
    (entry,) = cache.values()
    assert tuple(entry["key"].shape) == tuple(entry["value"].shape) == (2, case["heads"], MAX_LENGTH, 4)
    np.testing.assert_array_equal(as_numpy(entry["mask"])[:, :T], padding)
    assert not as_numpy(entry["mask"])[:, T:].any()


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("given", ["scope", "layer"])
@pytest.mark.parametrize("steps", [(4, 1, 1, 1), (1, 1, 5), (2, 5), (7,)], ids=str)
def test_positional_embedding_counts_on(kind, padding, given, steps):
    layer = PositionalEmbedding(kind, MAX_LENGTH)
    x, padding = random(2, T, DIM), PADDINGS[padding]
    expected = as_numpy(layer(x, mask=ops.convert_to_tensor(padding)))

    def call(start, stop):
        mask = ops.convert_to_tensor(padding[:, start:stop]) if given == "layer" else None
        return layer(x[:, start:stop], mask=mask)

    output, _ = decode(call, steps, padding if given == "scope" else None)
    np.testing.assert_allclose(output[padding], expected[padding], atol=1e-5)


def language_model(mask_zero=True, **attention):
    ids = keras.Input((None,), dtype="int32", name="token_ids")
    x = PositionalEmbedding("learned", 12)(keras.layers.Embedding(20, DIM, mask_zero=mask_zero)(ids))
    for _ in range(2):
        x = DecoderBlock(MultiHeadSelfAttention(2, causal=True, **attention), 16)(x)
    return keras.Model(ids, keras.layers.Dense(20)(x))


def translator():
    source = keras.Input((None,), dtype="int32", name="source_ids")
    target = keras.Input((None,), dtype="int32", name="target_ids")
    context = keras.layers.Embedding(20, DIM, mask_zero=True)(source)
    context = EncoderBlock(2, 16)(PositionalEmbedding()(context))
    x = PositionalEmbedding()(keras.layers.Embedding(20, DIM, mask_zero=True)(target))
    for _ in range(2):
        x = DecoderBlock(MultiHeadSelfAttention(2, causal=True, position=RotaryEmbedding()), 16, 2)(x, context)
    # Both halves, as a generator cuts them: the context is computed once.
    return keras.Model(source, context), keras.Model([target, context], x)


@pytest.mark.parametrize("steps", [(4, 1, 1, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_functional_model_decodes_as_it_stands(padding, steps):
    padding = PADDINGS[padding]
    ids = np.where(padding, np.random.default_rng(0).integers(1, 20, (2, T)), 0).astype("int32")
    model = language_model(position=AlibiBias(2))
    expected = as_numpy(model(ids))
    output, cache = decode(lambda start, stop: model(ids[:, start:stop]), steps)
    np.testing.assert_allclose(output[padding], expected[padding], atol=1e-4)
    assert sum("key" in entry for entry in cache.values()) == 2


@pytest.mark.parametrize("steps", [(1, 1, 1, 4), (3, 2, 2)], ids=str)
def test_cross_attention_reads_its_context_once(steps, monkeypatch):
    encoder, decoder = translator()
    source = np.array([[4, 5, 6, 0, 0], [7, 8, 9, 10, 1]], "int32")
    target = ops.convert_to_tensor(np.random.default_rng(0).integers(1, 20, (2, T)), "int32")
    context = encoder(source)
    expected = as_numpy(decoder([target, context]))
    projected = []
    project = CrossAttention.project_key_value
    monkeypatch.setattr(CrossAttention, "project_key_value", lambda *args: projected.append(1) or project(*args))
    output, cache = decode(lambda start, stop: decoder([target[:, start:stop], context]), steps)
    np.testing.assert_allclose(output, expected, atol=1e-4)
    assert len(projected) == 2  # Two layers, one call each.
    kept = [entry for entry in cache.values() if "context_key" in entry]
    assert len(kept) == 2
    for entry in kept:
        assert tuple(entry["context_key"].shape) == (2, 2, 5, 4)
        np.testing.assert_array_equal(as_numpy(entry["context_mask"]), source != 0)


def test_a_layer_called_twice_has_two_caches_and_two_records():
    attention, positions = MultiHeadSelfAttention(2, causal=True, name="twice"), PositionalEmbedding(name="count")
    inputs = keras.Input((None, DIM))
    model = keras.Model(inputs, attention(positions(attention(positions(inputs)))))
    x = random(2, T, DIM)
    expected = as_numpy(model(x))
    output, cache = decode(lambda start, stop: model(x[:, start:stop]), (3, 1, 3), LEFT)
    masked = as_numpy(attention(positions(attention(positions(x, mask=LEFT), mask=LEFT), mask=LEFT), mask=LEFT))
    np.testing.assert_allclose(output[LEFT], masked[LEFT], atol=1e-4)
    output, cache = decode(lambda start, stop: model(x[:, start:stop]), (3, 1, 3))
    np.testing.assert_allclose(output, expected, atol=1e-4)
    assert set(cache) == {"twice", "twice@1"}
    assert not np.allclose(as_numpy(cache["twice"]["key"]), as_numpy(cache["twice@1"]["key"]))
    with RecordingScope(["weights"]) as scope:
        np.testing.assert_allclose(as_numpy(model(x)), expected, atol=1e-5)
    assert list(scope.records) == ["twice/weights", "twice@1/weights"]


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4}


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("steps", [(2, 1, 1), (4,), (7,)], ids=str)
def test_dynamic_rotary_equals_the_whole_up_to_the_length_of_training_and_in_one_call(padding, steps):
    layer = MultiHeadSelfAttention(2, causal=True, position=RotaryEmbedding(scaling=DYNAMIC))
    padding = PADDINGS[padding][:, : sum(steps)]
    x = random(2, sum(steps), DIM)
    expected = as_numpy(layer(x, mask=ops.convert_to_tensor(padding)))
    output, _ = decode(lambda start, stop: layer(x[:, start:stop]), steps, padding)
    np.testing.assert_allclose(output[padding], expected[padding], atol=1e-4)


@pytest.mark.parametrize("window", [None, 3])
def test_a_prefix_in_the_first_call_is_seen_by_what_follows_as_ever(window):
    layer = kt.layers.MultiHeadSelfAttention(2, causal=True, sliding_window=window)
    x, prefix, real = random(2, 7, 8), lengths(4, 2, size=7), np.ones((2, 7), bool)
    real[1, 0] = False
    whole = as_numpy(layer(x, mask=real, prefix_mask=prefix))
    causal = as_numpy(layer(x, mask=real))
    assert np.abs(whole - causal)[0, :3].max() > 1e-3 > 1e-5 > np.abs(whole - causal)[0, 4:].max()
    with kt.scopes.DecodingScope(max_length=9) as scope:
        parts = [layer(x[:, :5], mask=real[:, :5], prefix_mask=prefix[:, :5])]
    for i in (5, 6):
        with kt.scopes.DecodingScope(scope.cache, index=i) as scope:
            parts.append(layer(x[:, i : i + 1], mask=real[:, i : i + 1], prefix_mask=prefix[:, i : i + 1]))
    np.testing.assert_allclose(np.concatenate([as_numpy(part) for part in parts], axis=1)[real], whole[real], atol=1e-5)


def test_placeholders_are_counted_from_call_to_call():
    layer = kt.layers.Placeholders(9)
    x, ids, vectors = random(2, 6, 4), np.array([[9, 1, 9, 9, 9, 2], [1, 1, 9, 2, 9, 9]], "int32"), random(2, 2, 4)
    whole = as_numpy(layer(x, ids, vectors))
    held = {(0, 0): 0, (0, 2): 1, (1, 2): 0, (1, 4): 1}  # A third one keeps its embedding.
    for row, place in np.ndindex(2, 6):
        number = held.get((row, place))
        np.testing.assert_array_equal(whole[row, place], x[row, place] if number is None else vectors[row, number])
    parts, cache = [], None
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 6)):
        with kt.scopes.DecodingScope(cache, index=start, max_length=6) as scope:
            parts.append(as_numpy(layer(x[:, start:end], ids[:, start:end], vectors)))
        cache = scope.cache
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_dynamic_rotary_turns_each_key_by_the_length_at_its_coming():
    layer = MultiHeadSelfAttention(2, causal=True, position=RotaryEmbedding(scaling=DYNAMIC))
    x, steps = random(2, T, DIM), (3, 1, 1, 2)
    output, _ = decode(lambda start, stop: layer(x[:, start:stop]), steps)
    reached = np.repeat(np.cumsum(steps), steps)

    def rotated(part):  # What is rotated at position `at` of a sequence of `reached[at]`.
        turned = [
            layer.position.rotate(part[:, :, at : at + 1], ops.convert_to_tensor([at], "int32"), int(reached[at]))
            for at in range(T)
        ]
        return ops.concatenate(turned, axis=2)

    key, value = layer.project_key_value(ops.convert_to_tensor(x))
    query, key = rotated(layer.project_query(ops.convert_to_tensor(x))), rotated(key)
    expected = layer.attend(query, key, value, np.tril(np.ones((T, T), bool)), None, False)
    np.testing.assert_allclose(output, as_numpy(expected), atol=1e-4)
    assert np.abs(output - as_numpy(layer(x)))[:, 4:].max() > 1e-4


def test_a_compiled_step_takes_its_index_as_a_tensor():
    model = language_model(mask_zero=False, position=RotaryEmbedding())
    ids = np.random.default_rng(0).integers(1, 20, (2, T)).astype("int32")
    expected = as_numpy(model(ids))
    with DecodingScope(max_length=MAX_LENGTH) as scope:
        first = model(ids[:, :2])
    np.testing.assert_allclose(as_numpy(first), expected[:, :2], atol=1e-4)
    calls = []

    def step(cache, index, token):
        calls.append(1)
        with DecodingScope(cache, index) as scope:
            logits = model(token)
        return logits, scope.cache

    step, cache = compiled(step), scope.cache
    for index in range(2, T):
        logits, cache = step(
            cache, ops.convert_to_tensor(index, "int32"), ops.convert_to_tensor(ids[:, index : index + 1])
        )
        np.testing.assert_allclose(as_numpy(logits)[:, 0], expected[:, index], atol=1e-4)
    assert keras.backend.backend() == "torch" or len(calls) == 1


BRANCHING = pairs(position=tuple(POSITIONS), window=(None, 3), rows=(1, 2), mask_zero=(False, True))


@pytest.mark.parametrize("case", BRANCHING, ids=case_id)
def test_branches_are_decoded_as_each_would_be_alone(case):
    width, steps, prompt_length, rows = 3, 3, 4, case["rows"]
    options = POSITIONS[case["position"]]()
    if case["position"] == "relative":
        options = {"position": RelativePositionBias(2, 8, 16, bidirectional=False)}
    elif case["position"] == "alibi":
        options = {"position": AlibiBias(2)}
    model = language_model(case["mask_zero"], sliding_window=case["window"], **options)
    generator = np.random.default_rng(0)
    prompt = generator.integers(1, 20, (rows, prompt_length)).astype("int32")
    padding = np.arange(prompt_length) >= np.array([[0], [2]])[:rows]
    prompt = np.where(padding, prompt, 0)
    with DecodingScope(max_length=prompt_length + width * steps, padding_mask=ops.convert_to_tensor(padding)) as scope:
        model(prompt)
    cache, origins = scope.cache, np.zeros((rows, width, steps), "int32")
    texts = np.zeros((rows, width, 0), "int32")
    for i in range(steps):
        parents = generator.integers(0, width, (rows, width))
        origins, texts = (np.take_along_axis(x, parents[:, :, None], axis=1) for x in (origins, texts))
        origins[:, :, i] = np.arange(width)
        tokens = generator.integers(1, 20, (rows, width)).astype("int32")
        texts = np.concatenate([texts, tokens[:, :, None]], axis=-1)
        branches = Branches(prompt_length, ops.convert_to_tensor(origins), i + 1)
        with DecodingScope(cache, prompt_length + i, branches=branches) as scope:
            found = as_numpy(model(tokens))
        cache = scope.cache
        for row in range(rows):
            for branch in range(width):
                alone = np.concatenate([prompt[row][padding[row]], texts[row, branch]])[None]
                np.testing.assert_allclose(found[row, branch], as_numpy(model(alone))[0, -1], atol=1e-4)


@pytest.mark.parametrize(("index", "length"), [(0, 10), (8, 2), (9, 1)])
def test_past_the_cache_both_numbers_are_named(index, length):
    layer = MultiHeadSelfAttention(2, causal=True)
    with DecodingScope(max_length=MAX_LENGTH) as scope:
        layer(random(2, 1, DIM))
    with pytest.raises(
        ValueError, match=f"max_length=9 tokens; received {length} tokens at index={index}.*{index + length}"
    ):
        with DecodingScope(scope.cache, index):
            layer(random(2, length, DIM))
    assert kt.scopes.decoding() is None


def test_past_the_table_of_learned_positions_both_numbers_are_named():
    layer = PositionalEmbedding("learned", 4)
    with pytest.raises(ValueError, match="max_length=4; received length 5"):
        with DecodingScope(index=3, max_length=MAX_LENGTH):
            layer(random(2, 2, DIM))


def test_attention_that_is_not_causal_cannot_decode():
    layer = MultiHeadSelfAttention(2, name="both_ways")
    with pytest.raises(ValueError, match="`both_ways` is not causal.*`causal=True`.*outside of `DecodingScope`"):
        with DecodingScope(max_length=MAX_LENGTH):
            layer(random(2, 3, DIM))


def test_scopes_nest_and_end():
    assert kt.scopes.decoding() is None and kt.scopes.recording() is None
    with DecodingScope(max_length=3) as outer, RecordingScope() as record:
        assert kt.scopes.decoding() is outer and kt.scopes.recording() is record
        with DecodingScope(max_length=4) as inner:
            assert kt.scopes.decoding() is inner
        assert kt.scopes.decoding() is outer
        with pytest.raises(RuntimeError), RecordingScope():
            raise RuntimeError
        assert kt.scopes.recording() is record
    assert kt.scopes.decoding() is None and kt.scopes.recording() is None


def test_the_cache_that_was_handed_in_is_left_alone():
    layer = MultiHeadSelfAttention(2, causal=True)
    x = random(2, 3, DIM)
    with DecodingScope(max_length=4) as scope:
        layer(x[:, :2])
    before = {name: {key: as_numpy(value) for key, value in entry.items()} for name, entry in scope.cache.items()}
    outputs = []
    for _ in range(2):  # From one prompt one can go on twice.
        with DecodingScope(scope.cache, index=2):
            outputs.append(as_numpy(layer(x[:, 2:])))
    np.testing.assert_array_equal(*outputs)
    for name, entry in before.items():
        for key, value in entry.items():
            np.testing.assert_array_equal(as_numpy(scope.cache[name][key]), value)


def test_threads_do_not_see_each_others_scopes():
    layer = MultiHeadSelfAttention(2, causal=True)
    x = random(2, 3, DIM)
    layer(x)
    barrier, seen, failures = threading.Barrier(3), {}, []

    def work(name, scope):
        try:
            barrier.wait(timeout=60)
            if scope is None:
                seen[name] = (kt.scopes.decoding(), kt.scopes.recording())
                barrier.wait(timeout=60)
                return
            with scope:
                barrier.wait(timeout=60)
                layer(x)
                seen[name] = (kt.scopes.decoding(), kt.scopes.recording())
        except Exception as error:  # Shown below: pytest does not see what a thread raises.
            failures.append(error)
            barrier.abort()

    decoding, recording = DecodingScope(max_length=5), RecordingScope(["weights"])
    threads = [
        threading.Thread(target=work, args=arguments)
        for arguments in (("decoding", decoding), ("recording", recording), ("neither", None))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert seen == {"decoding": (decoding, None), "recording": (None, recording), "neither": (None, None)}
    assert len(decoding.cache) == len(recording.records) == 1


def test_recording_changes_nothing_and_names_every_attention():
    encoder, decoder = translator()
    source, target = np.array([[4, 5, 0]], "int32"), ops.convert_to_tensor([[1, 2, 3, 4]], "int32")
    expected = as_numpy(decoder([target, encoder(source)]))
    with RecordingScope(["weights"]) as scope:
        recorded = as_numpy(decoder([target, encoder(source)]))
    np.testing.assert_allclose(recorded, expected, atol=1e-5)
    shapes = [tuple(value.shape) for value in scope.records.values()]
    assert shapes == [(1, 2, 3, 3), (1, 2, 4, 4), (1, 2, 4, 3), (1, 2, 4, 4), (1, 2, 4, 3)]
    for path, value in scope.records.items():
        np.testing.assert_allclose(as_numpy(value).sum(-1), 1, atol=1e-5, err_msg=path)
        block, attention, name = path.split("/")
        assert block.startswith(("encoder_block", "decoder_block")) and name == "weights"
        assert attention in ("self_attention", "cross_attention")
