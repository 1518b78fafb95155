"""Every generation setting of transformers is followed, refused by its name, or known not to change the tokens."""

import json

import pytest

from keras_transformer.generation import BeamSearch, Constraints, Greedy, Sampling
from keras_transformer.pretrained.settings import generator_options

# What says how to compute, what to return besides the tokens, or how many of them, which `generate` is told.
NO_TOKENS = {
    "_from_model_config", "assistant_confidence_threshold", "assistant_lookbehind", "cache_config",
    "cache_implementation", "compile_config", "continuous_batching_config", "disable_compile", "is_assistant",
    "low_memory", "max_cache_len", "max_length", "max_new_tokens", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "prefill_chunk_size", "return_dict_in_generate", "speculation_type", "target_lookbehind", "transformers_version",
    "use_cache", "use_mtp",
}  # fmt: skip
# setting -> (a value that changes something, the argument of `Generator` that it changes)
FOLLOWED = {
    "bos_token_id": (3, "start_id"),
    "decoder_start_token_id": (3, "start_id"),
    "eos_token_id": ([3, 4], "end_id"),
    "pad_token_id": (3, "pad_id"),
    "do_sample": (True, Sampling(top_k=50)),
    "temperature": (0.5, Sampling(0.5, top_k=50)),
    "top_k": (0, Sampling()),
    "top_p": (0.5, Sampling(top_k=50, top_p=0.5)),
    "min_p": (0.5, Sampling(top_k=50, min_p=0.5)),
    "typical_p": (0.5, Sampling(top_k=50, typical_p=0.5)),
    "num_beams": (4, BeamSearch(4)),
    "length_penalty": (0.0, BeamSearch(4, 0.0)),
    "early_stopping": ("never", BeamSearch(4, early_stopping="never")),
    "prompt_lookup_num_tokens": (3, Greedy(3, ngram_size=2)),
    "max_matching_ngram_size": (4, Greedy(3, ngram_size=4)),
    "suppress_tokens": ([3], Constraints(suppressed=[3])),
    "begin_suppress_tokens": ([3], Constraints(suppressed_first=[3])),
    "forced_bos_token_id": (3, Constraints(forced_first=3)),
    "forced_eos_token_id": ([3, 4], Constraints(forced_last=[3, 4])),
    "min_length": (3, Constraints(min_length=3)),
    "min_new_tokens": (3, Constraints(min_new_tokens=3)),
    "bad_words_ids": ([[3], [3, 4]], Constraints(forbidden_sequences=[[3], [3, 4]])),
    "repetition_penalty": (1.2, Constraints(repetition_penalty=1.2)),
    "no_repeat_ngram_size": (3, Constraints(no_repeat_ngram_size=3)),
    "encoder_no_repeat_ngram_size": (3, Constraints(no_repeat_source_ngram_size=3)),
    "renormalize_logits": (True, Constraints(renormalize=True)),
}
NEEDED = {
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "typical_p"), {"do_sample": True}),
    **dict.fromkeys(("length_penalty", "early_stopping"), {"num_beams": 4}),
    "max_matching_ngram_size": {"prompt_lookup_num_tokens": 3},
}
# setting -> (a value that changes something, the argument of `Generator` that takes its place)
REFUSED = {
    "assistant_early_exit": (2, "sampler"),
    "assistant_ensemble_weight": (0.5, "sampler"),
    "constraints": ([[3]], "sampler"),
    "diversity_penalty": (0.5, "sampler"),
    "dola_layers": ("low", "sampler"),
    "encoder_repetition_penalty": (1.2, "constraints"),
    "epsilon_cutoff": (3e-4, "sampler"),
    "eta_cutoff": (3e-4, "sampler"),
    "exponential_decay_length_penalty": ([3, 1.1], "constraints"),
    "force_words_ids": ([[3]], "sampler"),
    "guidance_scale": (1.5, "constraints"),
    "max_time": (1.0, None),
    "num_beam_groups": (2, "sampler"),
    "num_return_sequences": (2, "sampler"),
    "penalty_alpha": (0.6, "sampler"),
    "remove_invalid_values": (True, "constraints"),
    "sequence_bias": ([[[3], -1.0]], "constraints"),
    "stop_strings": (["."], None),
    "token_healing": (True, None),
    "top_h": (0.4, "sampler"),
    "watermarking_config": ({"bias": 2.0}, "constraints"),
}


def options(directory, settings, chosen=(), configuration=()):
    (directory / "config.json").write_text(json.dumps(dict(configuration)))
    (directory / "generation_config.json").write_text(json.dumps(settings))
    return generator_options(directory, chosen)


def test_no_setting_is_ignored():
    from transformers import GenerationConfig

    assert set(GenerationConfig().to_dict()) == NO_TOKENS | set(FOLLOWED) | set(REFUSED)
    assert not NO_TOKENS & (set(FOLLOWED) | set(REFUSED)) and not set(FOLLOWED) & set(REFUSED)


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_followed(name, tmp_path):
    value, wanted = FOLLOWED[name]
    found = options(tmp_path, {**NEEDED.get(name, {}), name: value})
    if isinstance(wanted, str):
        assert found[wanted] == value
        return
    found = found["constraints" if isinstance(wanted, Constraints) else "sampler"]
    assert type(found) is type(wanted) and found.get_config() == wanted.get_config()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_unless_the_caller_decides(name, tmp_path):
    value, argument = REFUSED[name]
    with pytest.raises(ValueError, match=f"'{name}': "):
        options(tmp_path, {name: value})
    for chosen in ("sampler", "constraints"):
        if chosen == argument:
            options(tmp_path, {name: value}, (chosen,))
        else:
            with pytest.raises(ValueError, match=f"'{name}': "):
                options(tmp_path, {name: value}, (chosen,))


def test_sampling_with_beams_is_refused(tmp_path):
    settings = {"num_beams": 2, "do_sample": True}
    with pytest.raises(ValueError, match="`do_sample` with `num_beams`=2"):
        options(tmp_path, settings)
    assert options(tmp_path, settings, ("sampler",))["sampler"] is None


def test_defaults_of_transformers_ask_for_nothing(tmp_path):
    from transformers import GenerationConfig

    for settings in ({}, GenerationConfig().to_dict(), GenerationConfig._get_default_generation_params()):
        settings = {name: value for name, value in settings.items() if name != "transformers_version"}
        found = options(tmp_path, settings)
        assert isinstance(found.pop("sampler"), Greedy)
        assert found == {"start_id": None, "end_id": None, "pad_id": 0, "constraints": None}


def test_a_number_of_new_tokens_goes_before_one_of_all(tmp_path):
    constraints = options(tmp_path, {"min_length": 9, "min_new_tokens": 2})["constraints"]
    assert constraints.get_config() == Constraints(min_new_tokens=2).get_config()


def test_a_configuration_counts_only_where_there_are_no_settings(tmp_path):
    configuration = {
        "num_beams": 4, "no_repeat_ngram_size": 3, "bos_token_id": 5, "eos_token_id": 2, "decoder_start_token_id": 6,
        "force_bos_token_to_be_generated": True, "top_h": 0.4,
    }  # fmt: skip
    found = options(tmp_path, {"eos_token_id": 2, "bos_token_id": 1}, configuration=configuration)
    assert isinstance(found["sampler"], Greedy) and found["constraints"] is None and found["start_id"] == 1
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="'top_h': 0.4"):
        generator_options(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**configuration, "top_h": None}))
    found = generator_options(tmp_path)
    assert found["sampler"].width == 4 and (found["start_id"], found["end_id"], found["pad_id"]) == (6, 2, 2)
    wanted = Constraints(forced_first=5, no_repeat_ngram_size=3)
    assert found["constraints"].get_config() == wanted.get_config()
    (tmp_path / "config.json").write_text(json.dumps({"text_config": configuration, "top_h": None}))
    assert generator_options(tmp_path)["sampler"].width == 4
