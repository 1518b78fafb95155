"""Prompt lookup takes fewer steps to the tokens of greedy decoding, whatever the model is made of."""

import copy
import functools

import keras
import numpy as np
import pytest
from keras import ops
from small_models import MODELS, decoder_only, inputs_for, token_input

from keras_transformer.generation import Constraints, Generator, Greedy
from keras_transformer.generation import generator as generator_module
from keras_transformer.generation.history import History
from keras_transformer.generation.prompt_lookup import propose, search_with_lookup
from keras_transformer.layers import RotaryEmbedding

PROMPT = [5, 9, 4, 8, 5, 9, 4]


NAMES = [
    "transformer",
    "two encoders by hand",
    "learned",
    "rotary, grouped",
    "alibi, window",
    "one block twice",
    "shared relative bias",
]


@pytest.fixture(autouse=True)
def loops_run_eagerly(request, monkeypatch):
    """Runs TensorFlow's loop as it is, unless a test is about its compilation, which takes most of the time here."""
    if keras.backend.backend() == "tensorflow" and "compiled" not in request.keywords:
        monkeypatch.setattr(generator_module, "compile_function", lambda function, *_: function)


@functools.cache
def generator_of(name):
    return Generator(MODELS[name](), start_id=1)


def run(generator, inputs, count, **changes):
    """The new tokens of a generator that differs in `changes`, and how many tokens its decoder read at a time."""
    generator = copy.copy(generator)
    generator.graph, generator._compiled = copy.copy(generator.graph), {}
    vars(generator).update(changes)
    decode, lengths = generator.graph.decode, []

    def counted(tokens, *rest, **options):
        lengths.append(tokens.shape[1])
        return decode(tokens, *rest, **options)

    generator.graph.decode = counted
    return generator.generate(inputs, count), lengths[1:]


def assert_same_tokens(generator, count=10, prompt=PROMPT, rows=1, sizes=(3, 1), **changes):
    """Holds lookup to plain greedy decoding; returns the lengths of its steps."""
    inputs = {**inputs_for(generator.model, rows), token_input(generator.model): [prompt] * rows}
    wanted, _ = run(generator, inputs, count, **changes)
    found, lengths = run(generator, inputs, count, sampler=Greedy(*sizes), **changes)
    np.testing.assert_array_equal(found, wanted)
    return lengths


@pytest.mark.parametrize("name", NAMES)
def test_models_write_the_tokens_of_greedy_decoding(name):
    assert 4 in assert_same_tokens(generator_of(name))


@pytest.mark.parametrize(
    "sizes, prompt", [((1, 1), [7]), ((2, 2), [0, 0, *PROMPT, 0]), ((6, 1), [3] * 31), ((5, 3), PROMPT)], ids=str
)
def test_any_size_and_any_prompt_will_do(sizes, prompt):
    assert_same_tokens(generator_of("learned"), prompt=prompt, sizes=sizes)


@pytest.mark.parametrize("count", [1, 4, 5, 9])
def test_no_step_reads_on_beyond_the_last_position(count):
    lengths = assert_same_tokens(Generator(decoder_only(learned=len(PROMPT) + count - 1)), count)
    assert count < 9 or 4 in lengths


class Continued:
    """In the place of constraints: each token is the one after the last, if that stands where it should."""

    no_repeat_source_ngram_size = 0
    text = np.array([8, 5, 9, 4] * 4, "int32")

    def apply(self, scores, history, end_id):
        text = ops.convert_to_tensor(self.text)
        wanted = ops.take(text, ops.minimum(history.count, len(self.text) - 1))
        wanted = ops.where(history.last(1) == ops.take(text, (history.count + 3) % 4), wanted, 0)
        return ops.where(ops.arange(scores.shape[-1], dtype="int32") == wanted, 1e9, scores)


def test_constraints_hold_for_each_token():
    generator = generator_of("learned")
    found, lengths = run(generator, {"token_ids": [PROMPT]}, 16, constraints=Continued(), sampler=Greedy(3, 2))
    np.testing.assert_array_equal(found[0], Continued.text)
    assert 4 in lengths and len(lengths) < 8
    constraints = Constraints(forbidden_sequences=[[5, 9], [7]], min_new_tokens=6, forced_last=2)
    assert 4 in assert_same_tokens(generator_of("alibi, window"), constraints=constraints, end_id=4)


def test_angles_that_depend_on_the_length_so_far_are_those_of_greedy_decoding():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4}
    lengths = assert_same_tokens(Generator(decoder_only(RotaryEmbedding(scaling=scaling))), 6)
    assert set(lengths) == {1}


def test_quantized_models():
    model = decoder_only()
    model.quantize("int8")
    assert 4 in assert_same_tokens(Generator(model))


def test_rows_of_a_batch_go_on_token_by_token():
    assert set(assert_same_tokens(generator_of("learned"), 6, rows=3)) == {1}


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["transformer", "rotary, grouped"])
def test_compiled(name):
    if keras.backend.backend() == "tensorflow":  # Elsewhere the tests above run what is compiled, or nothing is.
        assert 4 in assert_same_tokens(generator_of(name), 16)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a SavedModel is TensorFlow's")
@pytest.mark.compiled
def test_batches_of_unknown_size_in_a_graph(monkeypatch):
    import tensorflow as tf

    model = generator_of("learned").model
    generator = Generator(model, sampler=Greedy(3, 1), jit_compile=False)
    looked_up, looks_up = [], generator._looks_up
    monkeypatch.setattr(generator, "_looks_up", lambda *x: looked_up.append(looks_up(*x)) or looked_up[-1])
    spec = {"token_ids": tf.TensorSpec((None, None), "int32")}
    serve = tf.function(lambda inputs: generator.generate_tensors(inputs, 8), input_signature=[spec])
    for rows in (1, 3):
        prompts = np.array([PROMPT] * rows, "int32")
        np.testing.assert_array_equal(serve({"token_ids": prompts}), Generator(model).generate(prompts, 8))
    assert sorted(looked_up) == [False, True]


def read(text, ahead, size):
    """What is proposed after `text`, of which the half is the prompt, and whether it is."""
    ids, cut = [ord(letter) for letter in text], len(text) // 2
    prompt, new = np.array([[0, 0, *ids[:cut]]], "int32"), np.array([[*ids[cut:], 0, 0, 0, 0, 0, 0]], "int32")
    history = History(*map(ops.convert_to_tensor, (prompt, prompt != 0, new)), ops.convert_to_tensor(len(ids) - cut))
    found, proposed = propose(history, size, ahead)
    return "".join(map(chr, ops.convert_to_numpy(proposed)[0])) if found else None


@pytest.mark.parametrize(
    "text, size, proposed",
    [
        ("abcdef", 1, None),
        ("abcdefab", 2, "cde"),
        ("abcdefcb", 2, None),
        ("abxab_ab", 2, "_ab"),  # After the last place of several.
        ("aaaaaa", 2, "aaa"),  # Where the row ends, on in a circle.
        ("xyzxyz", 3, "xyz"),
        ("a", 1, None),
        ("a", 2, None),
        ("ab", 3, None),
    ],
)
def test_what_is_proposed(text, size, proposed):
    assert read(text, 3, size) == proposed


def write(text, prompt, count, sizes, monkeypatch, end_id=None):
    """What lookup finds with a model that writes `text`, and the lengths of its steps."""

    def loop(unfinished, body, state):
        while unfinished(*state):
            state = body(*state)
        return state

    monkeypatch.setattr(ops, "while_loop", loop)
    text, lengths = np.array([*text, *[0] * 9], "int32"), []

    def scores(start, length):
        return ops.one_hot(ops.convert_to_tensor(text[None, start : start + length]), 10)

    def step(tokens, last, cache, ahead):
        lengths.append(1 + ahead)
        np.testing.assert_array_equal(ops.convert_to_numpy(tokens)[0, : int(last) + 1], text[: int(last) + 1])
        return scores(int(last) + 1, 1 + ahead), cache

    prompt, new = ops.convert_to_tensor([prompt], "int32"), ops.zeros((1, count), "int32")
    history = History(prompt, prompt > 0, new, ops.convert_to_tensor(0, "int32"))
    found = search_with_lookup(Greedy(*sizes), step, scores(0, 1)[:, 0], {}, history, count, end_id, 0)
    return ops.convert_to_numpy(found)[0].tolist(), lengths


def test_what_repeats_itself_takes_fewer_steps(monkeypatch):
    text = [5, 6, 7, 8] * 8 + [9] * 3
    found, lengths = write(text, [1], len(text), (4, 2), monkeypatch)
    assert found == text
    assert lengths == [1] * 5 + [5] * 5 + [1] * 4


@pytest.mark.parametrize("end_id", [8, 5, [9, 6]])
def test_a_row_ends_inside_of_what_was_proposed(end_id, monkeypatch):
    text, ends = [7, 8, 5, 6, 7, 8, 5], end_id if isinstance(end_id, list) else [end_id]
    found, lengths = write(text, [5, 6, 7, 8, 5, 6], len(text), (4, 2), monkeypatch, end_id)
    written = 1 + next(i for i, token in enumerate(text) if token in ends)
    assert found == text[:written] + [0] * (len(text) - written)
    assert lengths == [5]


def test_configuration_round_trip():
    generator = Generator(generator_of("learned").model, sampler=Greedy(prompt_lookup=4, ngram_size=2))
    again = Generator.from_config(generator.model, generator.get_config()).sampler
    assert (again.prompt_lookup, again.ngram_size) == (4, 2)
    assert Greedy.from_config({}).prompt_lookup == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt_lookup": -1}, "`prompt_lookup` must be an int of 0 or more; received prompt_lookup=-1"),
        ({"prompt_lookup": 2.5}, "`prompt_lookup` .*=2.5"),
        ({"prompt_lookup": 2, "ngram_size": 0}, "`ngram_size` must be a positive int; received ngram_size=0"),
    ],
)
def test_bad_input_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        Greedy(**options)
