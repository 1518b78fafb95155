"""Generated tokens of loaded checkpoints are those of transformers."""

import json

import keras
import numpy as np
import pytest
from reference_checkpoints import TEXT_MODELS, make

import keras_transformer as kt

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "gemma", "gemma2")
PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [20]]


def theirs(reference, prompts, count, **options):
    """What transformers generates after prompts padded on the left, without the prompts."""
    import torch

    length = max(map(len, prompts))
    ids = np.zeros((len(prompts), length), "int64")
    mask = np.zeros_like(ids)
    for row, (values, prompt) in enumerate(zip(ids, prompts, strict=True)):
        values[length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    with torch.no_grad():
        tokens = reference.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **options)
    tokens = tokens[:, length:].numpy()
    tokens = np.pad(tokens, ((0, 0), (0, count - tokens.shape[1])))
    ended = np.isin(tokens, np.array(options["eos_token_id"] or [], "int64"))
    after = np.cumsum(ended, axis=-1) - ended > 0
    return np.where(after, 0, tokens)  # With beams, transformers may fill up with an end token.


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_prompts_go_on_as_in_transformers(family, tmp_path):
    reference = make(*TEXT_MODELS[family], tmp_path)
    model = kt.pretrained.load(tmp_path)
    greedy = kt.generation.Generator(model)
    np.testing.assert_array_equal(greedy.generate(PROMPTS, 32), theirs(reference, PROMPTS, 32))
    padded = {"token_ids": [[0, 0, 7, 8], [9, 10, 11, 12]], "padding_mask": [[0, 0, 1, 1], [1, 1, 1, 1]]}
    np.testing.assert_array_equal(
        greedy.generate({name: np.array(value) for name, value in padded.items()}, 8),
        theirs(reference, [[7, 8], [9, 10, 11, 12]], 8),
    )


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_beams_and_several_ends(family, tmp_path):
    reference = make(*TEXT_MODELS[family], tmp_path)
    ends = sorted(set(theirs(reference, PROMPTS, 12)[:, 4].tolist()))[:2]
    model = kt.pretrained.load(tmp_path)
    beams = kt.generation.Generator(model, end_id=ends, sampler=kt.generation.BeamSearch(4))
    wanted = theirs(reference, PROMPTS, 12, num_beams=4, eos_token_id=ends)
    np.testing.assert_array_equal(beams.generate(PROMPTS, 12), wanted)


def test_settings_of_a_checkpoint_are_followed(tmp_path):
    reference = make(*TEXT_MODELS["gpt2"], tmp_path)
    plain = theirs(reference, PROMPTS, 8)
    settings = {
        "eos_token_id": [int(plain[0, 5]), 98],
        "pad_token_id": 0,
        "bos_token_id": 3,
        "num_beams": 3,
        "length_penalty": 0.5,
        "suppress_tokens": [int(plain[1, 1])],
        "begin_suppress_tokens": [int(plain[0, 0])],
        "forced_eos_token_id": 4,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    generator = kt.generation.Generator.from_pretrained(tmp_path)
    assert (generator.start_id, generator.end_id, generator.pad_id) == (3, settings["eos_token_id"], 0)
    assert generator.sampler.get_config() == {"width": 3, "length_penalty": 0.5}
    revived = kt.generation.Generator.from_config(generator.model, json.loads(json.dumps(generator.get_config())))
    # transformers forces the last token by the length of prompt and answer: one length of prompt at a time.
    wanted = np.concatenate([theirs(reference, [prompt], 8, **settings) for prompt in PROMPTS])
    for each in (generator, revived):
        np.testing.assert_array_equal(each.generate(PROMPTS, 8), wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repetition_penalty": 1.3}, "repetition_penalty"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"num_beams": 2, "do_sample": True}, "do_sample"),
        ({"num_beams": 2, "early_stopping": True}, "early_stopping"),
    ],
)
def test_settings_without_a_counterpart_are_refused(settings, message, tmp_path):
    make(*TEXT_MODELS["gpt2"], tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        kt.generation.Generator.from_pretrained(tmp_path)
    chosen = kt.generation.Generator.from_pretrained(tmp_path, sampler="greedy")
    assert isinstance(chosen.sampler, kt.generation.Greedy)


def test_constraints_on_scores():
    constraints = kt.generation.Constraints([1], [2], forced_first=None, forced_last=3, min_new_tokens=2)
    scores = keras.ops.zeros((1, 5))
    allowed = [
        keras.ops.convert_to_numpy(constraints.apply(scores, position, 4, end_id=4))[0] > -1 for position in range(4)
    ]
    wanted = [[0, 3], [0, 2, 3], [0, 2, 3, 4], [3]]
    assert [list(np.flatnonzero(row)) for row in allowed] == wanted
    with pytest.raises(ValueError, match="must not be negative"):
        kt.generation.Constraints(suppressed=[-1])
