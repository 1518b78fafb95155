"""Constraints do to scores what transformers does with the same settings, row by row."""

import json

import keras
import numpy as np
import pytest
from keras import ops
from reference_processors import processed
from small_models import VOCABULARY, decoder_only, inputs_for, seq2seq, token_input

from keras_transformer.generation import BeamSearch, Constraints, Generator, Sampling
from keras_transformer.generation import generator as generator_module
from keras_transformer.generation.history import History

SIZE, MAX_NEW_TOKENS = 9, 6
SEQUENCES = [[5], [2], [3, 4], [1, 2], [0, 3, 4], [6, 6, 6], [8] * 20]

# ours, and theirs where the names differ or are more
CASES = [
    ({"suppressed": [1, 7]}, {"suppress_tokens": [1, 7]}),
    ({"suppressed_first": [0, 3]}, {"begin_suppress_tokens": [0, 3]}),
    ({"forced_first": 4}, {"forced_bos_token_id": 4}),
    (
        {"forced_first": 4, "suppressed_first": [0, 3]},
        {"forced_bos_token_id": 4, "begin_suppress_tokens": [0, 3]},
    ),
    ({"forced_last": 2}, {"forced_eos_token_id": 2}),
    ({"forced_last": [2, 5]}, {"forced_eos_token_id": [2, 5]}),
    ({"forced_last": [2, 5], "suppressed": [0, 2]}, {"forced_eos_token_id": [2, 5], "suppress_tokens": [0, 2]}),
    ({"min_new_tokens": 3}, {}),
    ({"min_length": 5}, {}),
    ({"forbidden_sequences": SEQUENCES}, {"bad_words_ids": SEQUENCES}),
    ({"repetition_penalty": 1.7}, {}),
    ({"repetition_penalty": 0.5}, {}),
    *(({"no_repeat_ngram_size": size}, {}) for size in (1, 2, 3, 9)),
    *(({"no_repeat_source_ngram_size": size}, {"encoder_no_repeat_ngram_size": size}) for size in (1, 2, 3, 9)),
    ({"renormalize": True, "suppressed": [1]}, {"renormalize_logits": True, "suppress_tokens": [1]}),
    (
        {
            "suppressed": [7], "suppressed_first": [8], "forced_last": 2, "min_new_tokens": 2, "min_length": 4,
            "forbidden_sequences": [[3, 4]], "repetition_penalty": 1.2, "no_repeat_ngram_size": 2,
            "no_repeat_source_ngram_size": 3, "renormalize": True,
        },
        {
            "suppress_tokens": [7], "begin_suppress_tokens": [8], "forced_eos_token_id": 2,
            "bad_words_ids": [[3, 4]], "encoder_no_repeat_ngram_size": 3, "renormalize_logits": True,
        },
    ),
]  # fmt: skip
RENAMED = {
    "suppressed", "suppressed_first", "forced_first", "forced_last", "forbidden_sequences", "renormalize",
    "no_repeat_source_ngram_size",
}  # fmt: skip


def padded(rows, length):
    tokens = np.array([[0] * (length - len(row)) + row for row in rows], "int32")
    return tokens, np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])


@pytest.mark.parametrize("end_id", [2, [2, 5]], ids=["one end", "two ends"])
@pytest.mark.parametrize("ours, theirs", CASES, ids=lambda x: ", ".join(x) if isinstance(x, dict) else "")
def test_scores_are_those_of_transformers_for_each_row_alone(ours, theirs, end_id):
    settings = {**{name: x for name, x in ours.items() if name not in RENAMED}, **theirs, "eos_token_id": end_id}
    settings |= {"min_length": 0} if "min_new_tokens" in ours and "min_length" not in ours else {}
    constraints = Constraints(**ours)
    random = np.random.default_rng(4)
    changed = 0
    for count in range(MAX_NEW_TOKENS):
        prompts = [random.integers(0, SIZE, length).tolist() for length in (7, 1, 4, 1, 2)]
        new = random.integers(0, SIZE, (len(prompts), MAX_NEW_TOKENS)).astype("int32")
        new[:, :count] = np.minimum(new[:, :count], 4)  # Few enough to repeat.
        sources = [random.integers(0, 5, length).tolist() for length in (3, 12, 2, 8, 5)]
        scores = random.normal(size=(len(prompts), SIZE)).astype("float32") * 3
        history = History(
            *map(ops.convert_to_tensor, padded(prompts, 12)),
            ops.convert_to_tensor(new),
            ops.convert_to_tensor(count, "int32"),
            *map(ops.convert_to_tensor, padded(sources, 14)),
        )
        found = ops.convert_to_numpy(constraints.apply(ops.convert_to_tensor(scores), history, end_id))
        for row, prompt in enumerate(prompts):
            wanted = processed(
                scores[row : row + 1],
                settings,
                [prompt + new[row, :count].tolist()],
                len(prompt),
                MAX_NEW_TOKENS,
                source=[sources[row]],
            )[0]
            allowed = np.isfinite(wanted)
            changed += not np.array_equal(wanted, scores[row])
            np.testing.assert_array_equal(found[row] > -1e29, allowed, err_msg=f"{count} {row}")
            np.testing.assert_allclose(found[row][allowed], wanted[allowed], rtol=1e-5, atol=1e-6)
    assert changed >= 1 or 9 in ours.values()  # There is no n-gram as long as that.


MANY = Constraints(
    suppressed=[7],
    min_length=6,
    forbidden_sequences=[[3, 4], [5]],
    repetition_penalty=1.3,
    no_repeat_ngram_size=2,
    no_repeat_source_ngram_size=2,
    renormalize=True,
)
PROMPTS = [[5, 9, 4, 8, 6], [7], [3, 3, 11]]


@pytest.mark.compiled
@pytest.mark.parametrize("build, sampler", [(decoder_only, "greedy"), (seq2seq, BeamSearch(3))])
def test_compiled_equals_not_compiled_and_each_row_alone(build, sampler, monkeypatch):
    model = build()
    inputs = {**inputs_for(model, rows=3), token_input(model): PROMPTS}
    options = {"start_id": 1, "end_id": 2, "sampler": sampler, "constraints": MANY}
    generator = Generator(model, **options)
    if keras.backend.backend() == "tensorflow" and build is seq2seq:  # As a SavedModel has it.
        import tensorflow as tf

        tensors = {name: tf.constant(x) for name, x in inputs.items() if name != token_input(model)}
        tensors[token_input(model)] = tf.constant(padded(PROMPTS, 6)[0])
        compiled = tf.function(lambda tensors: generator.generate_tensors(tensors, 10))(tensors).numpy()
    else:
        compiled = generator.generate(inputs, 10)
    rows = (0, 2)  # The two have one size of prompt, for what compiles each.
    if keras.backend.backend() != "jax":
        monkeypatch.setattr(generator_module, "compile_function", lambda function, *_: function)
        rows = (0, 1, 2)
    stepwise = Generator(model, **options)
    for row in rows:
        alone = stepwise.generate({name: x[row : row + 1] for name, x in inputs.items()}, 10)
        np.testing.assert_array_equal(alone[0], compiled[row])


def test_what_is_generated_keeps_to_the_constraints():
    generator = Generator(decoder_only(), end_id=2, sampler=Sampling(3.0, seed=1), constraints=MANY)
    rows = generator.generate([[3, 6, 8, 10]] * 32, 12)
    assert {tuple(row) for row in rows} and not np.isin(rows, [5, 7]).any()
    for row in rows.tolist():
        row = row[: row.index(2) + 1] if 2 in row else row
        pairs = list(zip([3, 6, 8, 10, *row], [6, 8, 10, *row], strict=False))
        assert len(set(pairs)) == len(pairs) and (3, 4) not in pairs
        assert len(row) >= 3  # Of 6 tokens 4 are the prompt, and the end may be the one after.


def test_configuration_round_trip():
    generator = Generator(decoder_only(), sampler=BeamSearch(2, early_stopping="never"), constraints=MANY)
    config = json.loads(json.dumps(generator.get_config()))
    again = Generator.from_config(generator.model, config)
    assert again.get_config() == config
    assert again.constraints.get_config() == MANY.get_config()
    assert again.sampler.early_stopping == "never"


def features_only():
    from keras_transformer.layers import DecoderBlock

    features = keras.Input((None, 16), name="features")
    target = keras.Input((None,), dtype="int32", name="target_ids")
    x = DecoderBlock(2, 16, cross_attention=2)(keras.layers.Embedding(VOCABULARY, 16)(target), features)
    return keras.Model([features, target], keras.layers.Dense(VOCABULARY)(x))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Constraints(suppressed=[-1]), "must not be negative"),
        (lambda: Constraints(forbidden_sequences=[[3], [4, -1]]), "must not be negative"),
        (lambda: Constraints(no_repeat_ngram_size=-1), "must not be negative"),
        (lambda: Constraints(forbidden_sequences=[[]]), "at least a token"),
        (lambda: Constraints(suppressed=[3, 4], forced_last=[4]), r"token of `forced_last` .* received \[4\]"),
        (lambda: Constraints(repetition_penalty=0.0), "`repetition_penalty` must be positive; received 0.0"),
        (lambda: BeamSearch(2, early_stopping="always"), "`early_stopping` must be .* received 'always'"),
        (
            lambda: Generator(features_only(), constraints=Constraints(no_repeat_source_ngram_size=2)),
            r"`no_repeat_source_ngram_size`=2 .* received one with the inputs \['features'\]",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()
