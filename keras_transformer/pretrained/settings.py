"""The generation settings of a checkpoint, as arguments of a `Generator`."""

from pathlib import Path

from keras_transformer.generation import BeamSearch, Constraints, Greedy, Sampling
from keras_transformer.pretrained.checkpoint import read_json

# What changes the tokens and has no counterpart here, with the values that change nothing: by the argument of a
# `Generator` that takes its place where the caller gives one.
REFUSED = {
    "sampler": {
        "assistant_early_exit": (None,),
        "assistant_ensemble_weight": (None,),
        "constraints": (None,),
        "diversity_penalty": (None, 0.0),
        "dola_layers": (None,),
        "epsilon_cutoff": (None, 0.0),
        "eta_cutoff": (None, 0.0),
        "force_words_ids": (None,),
        "num_beam_groups": (None, 1),
        "num_return_sequences": (None, 1),
        "penalty_alpha": (None, 0.0),
        "top_h": (None,),
    },
    "constraints": {
        "encoder_repetition_penalty": (None, 1.0),
        "exponential_decay_length_penalty": (None,),
        "guidance_scale": (None, 1.0),
        "remove_invalid_values": (None, False),
        "sequence_bias": (None, {}, []),
        "watermarking_config": (None,),
    },
    "": {
        "max_time": (None,),
        "stop_strings": (None, []),
        "token_healing": (None, False),
    },
}


def generator_options(directory, chosen=()):
    """Reads `generation_config.json`, or where there is none the same fields of `config.json`.

    Args:
        directory: path of the checkpoint.
        chosen: names of arguments that the caller has decided, so that settings behind them do not matter.

    Returns:
        dict of arguments of `Generator`.

    Raises:
        ValueError: naming each setting that would change the tokens and cannot be followed.
    """
    settings = _settings(directory)
    for argument, neutral in REFUSED.items():
        asked = {name: settings[name] for name, values in neutral.items() if settings.get(name) not in values}
        if asked and argument not in chosen:
            instead = f"Give `{argument}` to generate without, or set them off" if argument else "Set them off"
            raise ValueError(
                f"The generation settings of {directory} ask for {asked}, of which there is none here. {instead} in "
                "generation_config.json."
            )
    end_id = settings.get("eos_token_id")
    ends = end_id if isinstance(end_id, list) else [] if end_id is None else [end_id]
    start_id = settings.get("decoder_start_token_id")
    pad_id = settings.get("pad_token_id")
    return {
        "start_id": start_id if start_id is not None else settings.get("bos_token_id"),
        "end_id": ends if len(ends) > 1 else (ends or [None])[0],
        "pad_id": pad_id if pad_id is not None else (ends or [0])[0],
        "sampler": None if "sampler" in chosen else _sampler(settings, directory),
        "constraints": None if "constraints" in chosen else _constraints(settings),
    }


def _settings(directory):
    """The settings that count: a file of their own goes before all that the configuration of the model says."""
    if (Path(directory) / "generation_config.json").exists():
        return read_json(directory, "generation_config.json")
    configuration = read_json(directory, "config.json")
    settings = {**(configuration.get("text_config") or {}), **configuration}
    if settings.get("force_bos_token_to_be_generated"):  # BART's spelling in its first configurations.
        settings.setdefault("forced_bos_token_id", settings.get("bos_token_id"))
    return settings


def _constraints(settings):
    """The constraints that are asked for, or None."""
    # A number of new tokens stands in the place of one of all tokens.
    min_length = settings.get("min_length") if settings.get("min_new_tokens") is None else 0
    options = {
        "suppressed": settings.get("suppress_tokens"),
        "suppressed_first": settings.get("begin_suppress_tokens"),
        "forced_first": settings.get("forced_bos_token_id"),
        "forced_last": settings.get("forced_eos_token_id"),
        "min_new_tokens": settings.get("min_new_tokens"),
        "min_length": min_length,
        "forbidden_sequences": settings.get("bad_words_ids"),
        "repetition_penalty": settings.get("repetition_penalty"),
        "no_repeat_ngram_size": settings.get("no_repeat_ngram_size"),
        "no_repeat_source_ngram_size": settings.get("encoder_no_repeat_ngram_size"),
        "renormalize": settings.get("renormalize_logits"),
    }
    constraints = Constraints(**{name: value for name, value in options.items() if value is not None})
    return constraints if constraints.get_config() != Constraints().get_config() else None


def _sampler(settings, directory):
    def value(name, default):
        return default if settings.get(name) is None else settings[name]

    width = value("num_beams", 1)
    if value("do_sample", False):
        if width > 1:
            raise ValueError(
                f"`do_sample` with `num_beams`={width} in {directory}: there is no sampling with beams here."
            )
        return Sampling(
            value("temperature", 1.0),
            value("top_k", 50) or None,
            settings.get("top_p"),
            min_p=settings.get("min_p"),
            typical_p=settings.get("typical_p"),
        )
    if width == 1:
        # It changes the speed alone: sampling and beam search do without.
        ahead = value("prompt_lookup_num_tokens", 0)
        return Greedy(ahead, value("max_matching_ngram_size", 2)) if ahead else Greedy()
    return BeamSearch(width, value("length_penalty", 1.0), value("early_stopping", False))
