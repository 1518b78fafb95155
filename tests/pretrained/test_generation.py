"""Generated tokens of loaded checkpoints are those of transformers, by the settings that the checkpoints come with."""

import json

import keras
import numpy as np
import pytest
from reference_checkpoints import DECODER, TEXT_MODELS, make, quiet
from reference_processors import processed

import keras_transformer as kt
from keras_transformer.generation import Generator, Sampling

COUNT = 16
EXPERTS = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
STACKS = {
    "vocab_size": 99, "d_model": 32, "max_position_embeddings": 100, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
}  # fmt: skip
MARIAN = {**STACKS, "pad_token_id": 98, "decoder_start_token_id": 98, "eos_token_id": 0, "scale_embedding": True}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
WHISPER = {
    **STACKS, "num_mel_bins": 8, "max_source_positions": 15, "max_target_positions": 40, "begin_suppress_tokens": None,
}  # fmt: skip

# name -> (architecture, configuration)
MODELS = {
    **{name: TEXT_MODELS[name] for name in ("gpt2", "llama", "mistral", "qwen2", "gemma", "gemma2")},
    "mixtral": ("MixtralForCausalLM", EXPERTS),
    "gpt_oss": ("GptOssForCausalLM", {**EXPERTS, "head_dim": 8}),
    "t5": ("T5ForConditionalGeneration", {**T5, "pad_token_id": 0, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", STACKS),
    "marian": ("MarianMTModel", MARIAN),
    "whisper": ("WhisperForConditionalGeneration", WHISPER),
}
NOISE = {"t5": (0.1, 2), "bart": (0.05, 0), "marian": (0.05, 4)}  # and the seed, for texts that do not go in circles
# XLA takes most of the time, and tests/generation holds it to the same tokens; JAX has nothing else that is quick.
JIT = keras.backend.backend() == "jax"
PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [20]]


def write(name, directory, logits_bias=()):
    """A checkpoint whose text is varied: norms of random signs keep a token from being followed by itself for ever."""
    import torch

    noise, seed = NOISE.get(name, (0.2, 0))
    model = make(*MODELS[name], directory, seed)
    with torch.no_grad(), quiet():
        one = 1 if name.startswith("gemma") else 0  # What a norm stores is its scale less that.
        for path, parameter in model.named_parameters():
            random = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter.copy_((parameter + one) * random.sign() - one)
            elif not any(word in path for word in ("embed", "shared", "wte")):
                parameter.add_(noise * random)
        for module in model.modules():
            if hasattr(module, "create_weight"):  # Sinusoids, which are not learned.
                module.weight.copy_(module.create_weight())
        for token, value in logits_bias:
            model.final_logits_bias[:, token] += value
        model.save_pretrained(directory)
        return type(model).from_pretrained(directory).eval()


def inputs_for(name):
    """A batch of rows of different lengths, as our models take it."""
    random = np.random.default_rng(5)
    if name == "whisper":
        return {"features": random.normal(size=(3, 30, 8)).astype("float32")}
    return PROMPTS if name in TEXT_MODELS or name in ("mixtral", "gpt_oss") else {"source_ids": PROMPTS}


def theirs(reference, inputs, count, settings, pad_id=0):
    """What transformers generates by the settings of a `generation_config.json`, without the prompt.

    Prompts are padded on the left, sources on the right; what follows an end is padding, which is not always so there.
    """
    import torch
    from transformers import GenerationConfig, GenerationMixin

    kind, rows = next(iter(inputs.items())) if isinstance(inputs, dict) else ("token_ids", inputs)
    if kind == "features":
        feed = {"input_features": torch.tensor(rows.transpose(0, 2, 1))}
    else:
        length = max(map(len, rows))
        fill = [[0] * (length - len(row)) for row in rows]
        left = kind == "token_ids"
        mask = [x + [1] * len(row) if left else [1] * len(row) + x for row, x in zip(rows, fill, strict=True)]
        ids = [[pad_id] * len(x) + row if left else row + [pad_id] * len(x) for row, x in zip(rows, fill, strict=True)]
        feed = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    reference.generation_config = GenerationConfig(**settings)
    with torch.no_grad(), quiet():  # Not Whisper's own, which cuts long speech in pieces and adds tokens of language.
        tokens = GenerationMixin.generate(reference, **feed, max_new_tokens=count)
    tokens = tokens[:, length if kind == "token_ids" else 1 :].numpy()
    tokens = np.pad(tokens, ((0, 0), (0, count - tokens.shape[1])), constant_values=pad_id)
    ends = np.ravel([] if settings.get("eos_token_id") is None else settings["eos_token_id"])
    ended = np.isin(tokens, ends)
    return np.where(np.cumsum(ended, axis=-1) - ended > 0, pad_id, tokens)


def ours(directory, model, inputs, count, settings, **options):
    (directory / "generation_config.json").write_text(json.dumps(settings))
    return Generator.from_pretrained(directory, model=model, jit_compile=JIT, **options).generate(inputs, count)


@pytest.mark.parametrize("name", MODELS)
def test_ragged_batches_go_on_as_in_transformers(name, tmp_path):
    reference, inputs = write(name, tmp_path), inputs_for(name)
    model = kt.pretrained.load(tmp_path)
    pad, start = reference.config.pad_token_id or 0, getattr(reference.config, "decoder_start_token_id", None)
    settings = {"pad_token_id": pad, "decoder_start_token_id": start}
    for beams in (1, 4):
        settings["num_beams"] = beams
        wanted = theirs(reference, inputs, COUNT, settings, pad)
        np.testing.assert_array_equal(ours(tmp_path, model, inputs, COUNT, settings), wanted)
        assert len(np.unique(wanted)) > 8 and len(np.unique(wanted, axis=0)) == 3, "Tokens must depend on those before."
    if not isinstance(inputs, dict):
        padded = {"token_ids": [[0, 0, 7, 8], [9, 10, 11, 12]], "padding_mask": [[0, 0, 1, 1], [1, 1, 1, 1]]}
        found = Generator(model, jit_compile=JIT).generate({name: np.array(value) for name, value in padded.items()}, 8)
        np.testing.assert_array_equal(found, theirs(reference, [[7, 8], [9, 10, 11, 12]], 8, {"pad_token_id": 0}))


# As they are published, but for the numbers of the tokens in the tiny vocabularies here.
PUBLISHED = {
    "marian": {  # Helsinki-NLP/opus-mt-en-de
        "bad_words_ids": [[98]],
        "bos_token_id": 0,
        "decoder_start_token_id": 98,
        "eos_token_id": 0,
        "forced_eos_token_id": 0,
        "max_length": 512,
        "num_beams": 6,
        "pad_token_id": 98,
        "renormalize_logits": True,
        "transformers_version": "4.32.0.dev0",
    },
    "bart": {  # facebook/bart-large-cnn
        "_from_model_config": True,
        "bos_token_id": 0,
        "decoder_start_token_id": 2,
        "early_stopping": True,
        "eos_token_id": 2,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
        "length_penalty": 2.0,
        "max_length": 142,
        "min_length": 56,
        "no_repeat_ngram_size": 3,
        "num_beams": 4,
        "pad_token_id": 1,
        "transformers_version": "4.27.0.dev0",
    },
    "qwen2": {  # Qwen/Qwen2-7B-Instruct
        "bos_token_id": 96,
        "pad_token_id": 96,
        "do_sample": True,
        "eos_token_id": [97, 96],
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "transformers_version": "4.37.0",
    },
}


@pytest.mark.parametrize(
    "name, count, bias, matter",
    [
        ("marian", 24, [(98, 4.0), (0, 1.0)], ["bad_words_ids", "renormalize_logits", "forced_eos_token_id"]),
        (
            "bart",
            70,
            [(2, 2.0)],
            ["early_stopping", "forced_bos_token_id", "length_penalty", "min_length", "no_repeat_ngram_size"],
        ),
    ],
)
def test_published_settings_give_the_tokens_of_transformers(name, count, bias, matter, tmp_path):
    reference, settings = write(name, tmp_path, bias), PUBLISHED[name]
    inputs = {"source_ids": [[7, 8, 9, 10, 11, 7, 8], [12, 13], [20], [7, 30, 31]]}
    wanted = theirs(reference, inputs, count, settings, settings["pad_token_id"])
    for setting in matter:
        without = {key: value for key, value in settings.items() if key != setting}
        changed = theirs(reference, inputs, count, without, settings["pad_token_id"])
        assert not np.array_equal(wanted, changed), f"{setting} must matter, or this would hold nothing."
    model = kt.pretrained.load(tmp_path)
    np.testing.assert_array_equal(ours(tmp_path, model, inputs, count, settings), wanted)


def test_published_settings_for_sampling_leave_what_transformers_leaves(tmp_path):
    import torch

    reference, settings = write("qwen2", tmp_path), PUBLISHED["qwen2"]
    prompts = [[96, 7, 8, 7, 9], [12, 13], [20, 96, 97]]
    model = kt.pretrained.load(tmp_path)
    # Padding is one of the ends, and both may stand in the prompt.
    for penalty in (1.05, 1.6):
        greedy = {**settings, "do_sample": False, "repetition_penalty": penalty}
        wanted = theirs(reference, prompts, 32, greedy, 96)
        found = ours(tmp_path, model, prompts, 32, {**settings, "repetition_penalty": penalty}, sampler="greedy")
        np.testing.assert_array_equal(found, wanted)
        assert not np.array_equal(wanted, theirs(reference, prompts, 32, {**greedy, "repetition_penalty": 1.0}, 96))
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    generator = Generator.from_pretrained(tmp_path, model=model, jit_compile=JIT)
    assert generator.sampler.get_config() == Sampling(0.7, 20, 0.8).get_config()
    generator.sampler.seed = 3
    drawn = 0
    for prompt, new in zip(prompts, generator.generate(prompts, 16).tolist(), strict=True):
        row = prompt + new[: next((i + 1 for i, token in enumerate(new) if token in (96, 97)), 16)]
        with torch.no_grad():
            logits = reference(torch.tensor([row])).logits[0].numpy()
        for place in range(len(prompt), len(row)):
            left = processed(logits[place - 1 : place], settings, [row[:place]], len(prompt), 16)[0]
            assert np.isfinite(left[row[place]]), "A token was drawn that transformers would not draw."
            drawn += left[row[place]] < left.max()
    assert drawn > 5, "Draws must not all be the most probable token."


def test_beams_stop_as_those_of_transformers(tmp_path):
    reference = write("gpt2", tmp_path)
    model = kt.pretrained.load(tmp_path)
    free = theirs(reference, PROMPTS, 16, {"pad_token_id": 0})
    ends = sorted({int(free[0, 4]), int(free[1, 2]), int(free[2, 6])})
    results = {}
    for early, penalty in ((False, 1.0), (True, 1.0), ("never", 1.0), (False, 0.0), ("never", -1.0)):
        settings = {"num_beams": 4, "early_stopping": early, "length_penalty": penalty, "eos_token_id": ends}
        settings["pad_token_id"] = 0
        wanted = theirs(reference, PROMPTS, 16, settings)
        np.testing.assert_array_equal(ours(tmp_path, model, PROMPTS, 16, settings), wanted)
        results[early, penalty] = wanted.tobytes()
    assert len({results[early, 1.0] for early in (False, True, "never")}) == 3
