import functools
import itertools

import keras
import numpy as np
import pytest
from keras import ops
from small_models import (
    MODELS,
    VOCABULARY,
    decoder_only,
    greedy_by_hand,
    inputs_for,
    logits_of,
    row_of,
    scatter_weights,
    seq2seq,
    token_input,
    two_encoders,
)

import keras_transformer as kt
from keras_transformer.generation import BeamSearch, Generator, Greedy, Sampling
from keras_transformer.generation import generator as generator_module
from keras_transformer.layers import RotaryEmbedding
from keras_transformer.scopes import DecodingScope


@functools.cache
def built(name):
    return MODELS[name]()


@pytest.fixture(params=MODELS)
def model(request):
    """Each of the models, for what must hold however attention is made up."""
    return built(request.param)


@pytest.fixture(params=["two encoders by hand", "rotary, grouped"])
def typical_model(request):
    """One of each kind, for what the loop around the model must do."""
    return built(request.param)


PROMPTS = [[5, 9, 4, 8, 6], [7], [3, 3, 11]]


def make(model, sampler="greedy", **options):
    return Generator(model, **{"start_id": 1, "sampler": sampler, **options})


def test_greedy_on_ragged_prompts_equals_each_prompt_alone_without_a_cache(model):
    sources = inputs_for(model, rows=3)
    generated = make(model).generate({**sources, token_input(model): PROMPTS}, 5)
    expected = [greedy_by_hand(model, row_of(sources, row), prompt, 5) for row, prompt in enumerate(PROMPTS)]
    np.testing.assert_array_equal(generated, expected)


def test_padding_of_prompts_on_either_side_changes_nothing(typical_model):
    model = typical_model
    sources = inputs_for(model, rows=3)
    length = max(map(len, PROMPTS)) + 2
    left = [[0] * (length - len(prompt)) + prompt for prompt in PROMPTS]
    right = [prompt + [0] * (length - len(prompt)) for prompt in PROMPTS]
    generator = make(model)
    results = [
        generator.generate({**sources, token_input(model): x}, 5) for x in (PROMPTS, np.array(left), np.array(right))
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("padding", [0, 2], ids=["whole", "left-padded"])
def test_cached_logits_equal_uncached_ones(model, padding):
    rows, length = 2, 7
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (rows, length)).astype("int32")
    real = np.arange(length)[None] >= np.array([[padding], [0]])
    tokens = np.where(real, tokens, 0).astype("int32")
    sources = inputs_for(model, rows)
    graph = make(model).graph
    boundary = graph.encode({name: ops.convert_to_tensor(x) for name, x in sources.items()})
    expected = [logits_of(model, row_of(sources, row), tokens[row : row + 1, real[row]])[0] for row in range(rows)]
    for chunks in ((4, 3), (2, 1, 4)):
        logits, cache, index = [], None, 0
        for chunk in chunks:
            now = slice(index, index + chunk)
            mask = ops.convert_to_tensor(real[:, now])
            with DecodingScope(cache, index, max_length=length, padding_mask=mask) as scope:
                logits.append(ops.convert_to_numpy(graph.decode(ops.convert_to_tensor(tokens[:, now]), boundary)))
            cache, index = scope.cache, index + chunk
        cached = np.concatenate(logits, axis=1)
        for row in range(rows):
            np.testing.assert_allclose(cached[row, real[row]], expected[row], atol=1e-4, err_msg=f"{chunks}")


def test_a_row_stops_at_its_end_and_is_padded(typical_model):
    model = typical_model
    sources = inputs_for(model, rows=3)
    free = make(model).generate({**sources, token_input(model): PROMPTS}, 8)
    end_id = int(free[0, 2])
    stopped = make(model, end_id=end_id, pad_id=0).generate({**sources, token_input(model): PROMPTS}, 8)
    for row, before in zip(stopped, free, strict=True):
        ends = np.flatnonzero(before == end_id)
        count = ends[0] + 1 if len(ends) else 8
        np.testing.assert_array_equal(row[:count], before[:count])
        assert not row[count:].any()


def test_beam_of_one_equals_greedy(typical_model):
    model = typical_model
    sources = {**inputs_for(model, rows=3), token_input(model): PROMPTS}
    end_id = int(make(model).generate(sources, 8)[0, 3])
    greedy, beam = (make(model, sampler, end_id=end_id).generate(sources, 8) for sampler in ("greedy", BeamSearch(1)))
    np.testing.assert_array_equal(greedy, beam)


def test_beam_search_on_ragged_prompts_equals_each_prompt_alone(typical_model):
    model = typical_model
    sources = {**inputs_for(model, rows=3), token_input(model): PROMPTS}
    generator = make(model, BeamSearch(3), end_id=2)
    together = generator.generate(sources, 6)
    for row in range(3):
        alone = generator.generate({name: x[row : row + 1] for name, x in sources.items()}, 6)
        np.testing.assert_array_equal(together[row], alone[0])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_beam_as_wide_as_the_search_space_equals_brute_force(length_penalty, seed):
    vocabulary, count, end_id = 4, 4, 2
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    x = kt.layers.DecoderBlock(2, 8)(keras.layers.Embedding(vocabulary, 8)(tokens))
    model = scatter_weights(keras.Model(tokens, keras.layers.Dense(vocabulary)(x)), spread=0.8, seed=seed)
    prompt = [1, 3]
    everything = np.array([[*prompt, *new] for new in itertools.product(range(vocabulary), repeat=count)])
    logits = logits_of(model, {}, everything)[:, len(prompt) - 1 : -1].astype("float64")
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    steps = np.take_along_axis(log_probabilities, everything[:, len(prompt) :, None], axis=-1)[..., 0]
    sums = {tuple(row[len(prompt) :]): total for row, total in zip(everything.tolist(), steps.cumsum(-1), strict=True)}

    def score(new):
        filled = (*new, *[0] * (count - len(new)))
        return sums[filled][len(new) - 1] / len(new) ** length_penalty

    whole = [
        new
        for length in range(1, count + 1)
        for new in itertools.product(range(vocabulary), repeat=length)
        if end_id not in new[:-1] and (new[-1] == end_id or length == count)
    ]
    best = max(whole, key=score)
    sampler = BeamSearch(vocabulary**count, length_penalty)
    found = make(model, sampler, end_id=end_id, pad_id=0).generate([prompt], count)
    np.testing.assert_array_equal(found[0], [*best, *[0] * (count - len(best))])


def count_calls(model):
    """A counter of how often the model's last layer is called from Python, which is what tracing does."""
    calls = []
    layer = model.layers[-1]
    original = layer.call
    layer.call = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    return calls


def test_a_models_cache_is_checked_once():
    model = decoder_only()
    calls = count_calls(model)
    make(model)
    assert calls
    calls.clear()
    make(model, BeamSearch(2))
    assert not calls


@pytest.mark.compiled
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch runs step by step: there is nothing to trace")
def test_a_second_call_traces_nothing_and_prompts_of_5_to_64_tokens_trace_at_most_twice():
    model = decoder_only()
    generator = make(model)
    generator.generate([[5] * 5], 4)
    calls = count_calls(model)
    for length in (5, 6, 17, 32):
        generator.generate([[4] * length], 4)
    assert not calls
    for length in (33, 50, 64):
        generator.generate([[4] * length], 4)
    a_trace = 2  # of the prompt, and of the loop's body
    assert len(calls) <= a_trace


@pytest.mark.compiled
@pytest.mark.parametrize("name, sampler", [("two encoders by hand", Greedy()), ("rotary, grouped", BeamSearch(3))])
def test_compiled_equals_not_compiled(name, sampler, monkeypatch):
    model = built(name)
    sources = {**inputs_for(model, rows=3), token_input(model): PROMPTS}
    ways = ("auto", False) if keras.backend.backend() == "tensorflow" else ("auto",)  # With XLA, and as a graph alone.
    found = [make(model, sampler, end_id=2, jit_compile=way).generate(sources, 6) for way in ways]
    monkeypatch.setattr(generator_module, "compile_function", lambda function, *_: function)
    expected = make(model, sampler, end_id=2).generate(sources, 6)
    for tokens in found:
        np.testing.assert_array_equal(tokens, expected)


@pytest.mark.compiled
def test_compiled_sampling_draws_anew_for_each_row_and_step():
    model = decoder_only()
    for variable in model.trainable_variables:
        variable.assign(np.zeros(variable.shape))  # all tokens are equally probable
    drawn = make(model, Sampling(seed=3)).generate([[4]] * 64, 32)
    shares = np.bincount(drawn.ravel(), minlength=VOCABULARY) / drawn.size
    np.testing.assert_allclose(shares, 1 / VOCABULARY, atol=0.02)
    # As many neighbours are alike, along rows and along steps, as chance has it.
    assert abs((drawn[:, 1:] == drawn[:, :-1]).mean() - 1 / VOCABULARY) < 0.02
    assert abs((drawn[1:] == drawn[:-1]).mean() - 1 / VOCABULARY) < 0.02


@pytest.mark.compiled
def test_weights_trained_after_compilation_count():
    model = decoder_only()
    generator = make(model)
    before = generator.generate([PROMPTS[0]], 6)
    scatter_weights(model, seed=5)
    after = generator.generate([PROMPTS[0]], 6)
    np.testing.assert_array_equal(after[0], greedy_by_hand(model, {}, PROMPTS[0], 6))
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("make_model", [seq2seq, two_encoders, decoder_only])
def test_a_reloaded_model_generates_the_same(make_model, tmp_path):
    model = make_model()
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    sources = {**inputs_for(model, rows=3), token_input(model): PROMPTS}
    original, again = (make(x, BeamSearch(2), end_id=2).generate(sources, 6) for x in (model, reloaded))
    np.testing.assert_array_equal(original, again)


def test_configuration_round_trip():
    model = decoder_only()
    generator = make(model, BeamSearch(3, length_penalty=0.5), end_id=2)
    config = generator.get_config()
    again = Generator.from_config(model, config)
    assert again.get_config() == config
    assert (again.sampler.width, again.sampler.length_penalty, again.end_id) == (3, 0.5, 2)


def test_longer_sources_than_the_bucket_and_unmasked_sources_are_not_padded_wrongly():
    model = seq2seq()
    sources = [[3 + i % 20 for i in range(length)] for length in (1, 15, 16, 17, 40)]
    generated = make(model).generate({"source_ids": sources}, 4)
    for row, source in zip(generated, sources, strict=True):
        expected = greedy_by_hand(model, {"source_ids": np.array([source])}, [1], 4)
        np.testing.assert_array_equal(row, expected)


class TestSampling:
    logits = np.log(np.array([[0.5, 0.25, 0.15, 0.1]], "float32"))

    @pytest.mark.parametrize(
        "options, expected",
        [
            ({}, [0.5, 0.25, 0.15, 0.1]),
            ({"temperature": 0.5}, np.square([0.5, 0.25, 0.15, 0.1]) / np.square([0.5, 0.25, 0.15, 0.1]).sum()),
            ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
            ({"top_k": 9}, [0.5, 0.25, 0.15, 0.1]),
            ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
            ({"top_p": 0.8}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
            ({"top_p": 1e-6}, [1, 0, 0, 0]),
            ({"top_k": 3, "top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ],
        ids=str,
    )
    def test_draws_follow_the_distribution(self, options, expected):
        rows = 40_000
        logits = ops.convert_to_tensor(np.repeat(self.logits, rows, axis=0))
        drawn = ops.convert_to_numpy(Sampling(**options).choose(logits, keras.random.SeedGenerator(1)))
        shares = np.bincount(drawn, minlength=4) / rows
        np.testing.assert_allclose(shares, expected, atol=0.015)
        assert not shares[np.asarray(expected) == 0].any()

    def test_a_seed_repeats_and_none_does_not(self):
        model = decoder_only()
        seeded = make(model, Sampling(seed=7))
        first, second = seeded.generate(PROMPTS, 12), seeded.generate(PROMPTS, 12)
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, make(model, Sampling(seed=7)).generate(PROMPTS, 12))
        free = make(model, Sampling())
        assert not np.array_equal(free.generate(PROMPTS, 12), free.generate(PROMPTS, 12))

    def test_top_1_is_greedy(self):
        model = decoder_only()
        np.testing.assert_array_equal(
            make(model, Sampling(top_k=1, seed=0)).generate(PROMPTS, 8), make(model).generate(PROMPTS, 8)
        )


def mixing_model(mix):
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    x = mix(keras.layers.Embedding(VOCABULARY, 16)(tokens))
    return keras.Model(tokens, keras.layers.Dense(VOCABULARY)(kt.layers.DecoderBlock(2, 24)(x)))


def feed_forward_only():
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    return keras.Model(tokens, keras.layers.Dense(4)(keras.layers.Embedding(4, 8)(tokens)))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Generator(keras.layers.Dense(3)), "functional"),
        (lambda: Generator(feed_forward_only()), "causal MultiHeadSelfAttention"),
        (lambda: Generator(mixing_model(kt.layers.EncoderBlock(2, 24))), "encoder_block|self_attention"),
        (lambda: Generator(mixing_model(keras.layers.GRU(16, return_sequences=True))), "gru"),
        (lambda: Generator(mixing_model(lambda x: ops.flip(x, axis=1) + ops.cumsum(x, axis=1))), "differ by"),
        (lambda: Generator(decoder_only(), sampler="gready"), "gready.*|greedy"),
        (lambda: Generator(decoder_only(), sampler=4), "search"),
        (lambda: make(decoder_only(), start_id=None).generate([[]], 4), "row 0 is empty"),
        (lambda: make(decoder_only()).generate({"tokens": [[4]]}, 4), "token_ids"),
        (lambda: make(decoder_only()).generate([[4]], 0), "max_new_tokens"),
        (lambda: make(decoder_only()).generate(np.array([4, 5]), 4), r"\(batch, length\)"),
        (lambda: make(seq2seq(), start_id=None).generate({"source_ids": [[4]]}, 4), "start_id"),
        (lambda: make(seq2seq()).generate({"target_ids": [[4]]}, 4), "source_ids"),
        (lambda: make(seq2seq()).generate({"source_ids": [[4]], "target_ids": [[1], [1]]}, 4), "number of rows"),
        (lambda: make(decoder_only(learned=10)).generate([[4] * 8], 4), "12 tokens.*max_length=10"),
        (lambda: BeamSearch(0), "width"),
        (lambda: Sampling(temperature=0), "temperature"),
        (lambda: Sampling(top_k=0), "top_k"),
        (lambda: Sampling(top_p=1.5), "top_p"),
    ],
)
def test_bad_input_says_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_rows_of_different_lengths_have_their_own_dynamic_angles():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4}
    model = decoder_only(RotaryEmbedding(scaling=scaling))
    prompts = [[5, 9, 4, 8, 6, 3, 7, 9], [7, 4, 4, 6, 3, 9]]
    generated = make(model).generate(prompts, 1)
    np.testing.assert_array_equal(generated, [greedy_by_hand(model, {}, prompt, 1, length=0) for prompt in prompts])


def test_a_learned_table_can_be_used_to_its_end():
    model = decoder_only(learned=10)
    generated = make(model).generate([[4] * 7], 4)
    np.testing.assert_array_equal(generated[0], greedy_by_hand(model, {}, [4] * 7, 4, length=10))
