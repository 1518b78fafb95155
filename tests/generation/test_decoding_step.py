"""One step of decoding as a model of its own: the logits of the whole model, and the tokens of `Generator`."""

import keras
import numpy as np
import pytest
from small_models import MODELS, decoder_only, inputs_for, logits_of, seq2seq, token_input

import keras_transformer as kt
from keras_transformer.generation import Generator, decoding_step, encoding_step
from keras_transformer.ops.masks import get_mask

ROOM = 14


def empty(step, rows):
    """The inputs called `past_...` of a step before its first call."""
    shapes = {x.name: (x.shape, x.dtype) for x in step.inputs if x.name.startswith("past_")}
    sized = {
        name: [rows, *(ROOM if size is None else size for size in shape[1:])] for name, (shape, _) in shapes.items()
    }
    return {name: np.zeros(shape, shapes[name][1]) for name, shape in sized.items()}


def run(model):
    """A model as a function of arrays, for steps that come back from other runtimes as such functions."""
    return lambda inputs: {name: keras.ops.convert_to_numpy(x) for name, x in model(inputs).items()}


def steps(call, step, prompt, real, context, choose, count):
    """Logits of a prompt, and of `count` tokens after it that `choose` takes from the logits before them."""
    name = token_input(step)
    mask = "padding_mask" if name == "token_ids" else "target_padding_mask"
    feed = {**empty(step, len(prompt)), **context, name: prompt, mask: real}
    found = []
    for _ in range(count + 1):
        outputs = call(feed)
        found.append(outputs.pop("logits"))
        tokens = choose(found[-1][:, -1]).astype("int32")[:, None]
        feed |= {f"past_{key.removeprefix('present_')}": x for key, x in outputs.items()}
        feed |= {name: tokens, mask: np.ones_like(tokens, bool)}
    return found


def contexts(model, sources, encoder=None):
    return (encoder or run(encoding_step(model)))(sources) if sources else {}


def sources_of(model, rows):
    return {name: x.astype("int32") if x.dtype.kind == "i" else x for name, x in inputs_for(model, rows).items()}


def assert_same_tokens(model, as_function=run):
    """Holds a loop over steps, with prompts of different lengths, to what the generator does."""
    step, prompt = decoding_step(model), np.array([[0, 0, 5], [3, 4, 6]], "int32")
    sources = sources_of(model, 2)
    wanted = Generator(model, jit_compile=False).generate({**sources, token_input(model): prompt}, 5)
    context = contexts(model, sources, as_function(encoding_step(model)) if sources else None)
    found = steps(as_function(step), step, prompt, prompt != 0, context, lambda x: x.argmax(axis=-1), 4)
    np.testing.assert_array_equal(np.stack([x[:, -1].argmax(axis=-1) for x in found], axis=1), wanted)


NAMES = [
    "transformer, separate output",
    "two encoders by hand",
    "alibi, window",
    "one block twice",
    "shared relative bias",
]


@pytest.mark.parametrize("name", NAMES)
def test_steps_have_the_logits_of_the_model(name):
    model = MODELS[name]()
    step, sources, tokens = decoding_step(model), sources_of(model, 2), np.random.default_rng(0).integers(3, 24, (2, 6))
    following = iter(tokens[:, 4:].T)
    prompt, real = tokens[:, :4].astype("int32"), np.ones((2, 4), bool)
    found = steps(run(step), step, prompt, real, contexts(model, sources), lambda _: next(following, tokens[:, 0]), 2)
    np.testing.assert_allclose(np.concatenate(found, axis=1), logits_of(model, sources, tokens), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("model", [lambda: decoder_only(learned=20), lambda: seq2seq(depth=1)])
def test_padded_prompts_give_the_tokens_of_the_generator(model):
    assert_same_tokens(model())


def test_a_step_is_saved(tmp_path):
    step = decoding_step(decoder_only())
    step.save(tmp_path / "step.keras")
    again = keras.saving.load_model(tmp_path / "step.keras")
    prompt = np.array([[3, 4, 6]], "int32")
    found = [steps(run(x), x, prompt, prompt != 0, {}, lambda x: x.argmax(axis=-1), 1) for x in (step, again)]
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_what_the_decoder_reads_of_its_sources_beside_cross_attention_comes_along():
    source = keras.Input((None,), dtype="int32", name="source_ids")
    target = keras.Input((None,), dtype="int32", name="target_ids")
    context = keras.layers.Embedding(24, 8, mask_zero=True)(source)
    first = context[:, :1]  # Is added to each token, by no attention.
    x = keras.layers.Embedding(24, 8)(target) + keras.layers.Dense(8)(first)
    x = kt.layers.DecoderBlock(2, 12, cross_attention=2)(x, context)
    model = keras.Model([source, target], keras.layers.Dense(24)(x))
    encoder, step = encoding_step(model), decoding_step(model)
    handed_on = {x.name for x in step.inputs if x.name.startswith(("context", "source"))}
    assert handed_on == set(encoder.output) and len([name for name in handed_on if name.startswith("source")]) == 1
    sources, tokens = {"source_ids": np.array([[5, 6, 0], [7, 8, 9]], "int32")}, np.array([[3, 4], [6, 7]])
    found = steps(run(step), step, tokens.astype("int32"), tokens != 0, contexts(model, sources), lambda x: x[:, 0], 0)
    np.testing.assert_allclose(found[0], logits_of(model, sources, tokens), atol=1e-5)
    assert get_mask(model.inputs[0]) is None


def test_models_without_a_source_have_no_encoder():
    with pytest.raises(
        ValueError, match="must have other inputs than the tokens .* received one with 'token_ids' alone"
    ):
        encoding_step(decoder_only())
