"""The generation settings of a checkpoint, as arguments of a `Generator`."""

from pathlib import Path

from keras_transformer.generation import BeamSearch, Constraints, Greedy, Sampling
from keras_transformer.pretrained.checkpoint import read_json

# What changes the tokens and has no counterpart here, with the values that change nothing.
NEUTRAL = {
    "assistant_early_exit": (None,),
    "bad_words_ids": (None, []),
    "constraints": (None,),
    "diversity_penalty": (None, 0.0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1, 1.0),
    "min_p": (None, 0.0),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0.0),
    "prompt_lookup_num_tokens": (None,),
    "remove_invalid_values": (None, False),
    "renormalize_logits": (None, False),
    "repetition_penalty": (None, 1.0),
    "sequence_bias": (None, {}),
    "stop_strings": (None, []),
    "top_h": (None,),
    "typical_p": (None, 1.0),
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
    configuration = read_json(directory, "config.json")
    separate = (Path(directory) / "generation_config.json").exists()
    settings = {**configuration, **(read_json(directory, "generation_config.json") if separate else {})}
    if "text_config" in configuration:
        settings = {**configuration["text_config"], **settings}
    asked = {name: settings[name] for name, neutral in NEUTRAL.items() if settings.get(name) not in (*neutral, None)}
    if asked and "sampler" not in chosen:
        raise ValueError(
            f"The generation settings of {directory} ask for {asked}, of which there is none here. Give a `sampler` to "
            "generate without, or set them off in generation_config.json."
        )
    end_id = settings.get("eos_token_id")
    ends = end_id if isinstance(end_id, list) else [] if end_id is None else [end_id]
    start_id = settings.get("decoder_start_token_id", settings.get("bos_token_id"))
    pad_id = settings.get("pad_token_id")
    constraints = {
        "suppressed": settings.get("suppress_tokens") or (),
        "suppressed_first": settings.get("begin_suppress_tokens") or (),
        "forced_first": settings.get("forced_bos_token_id"),
        "forced_last": settings.get("forced_eos_token_id"),
        "min_new_tokens": settings.get("min_new_tokens") or 0,
    }
    return {
        "start_id": start_id if start_id is not None else settings.get("bos_token_id"),
        "end_id": ends if len(ends) > 1 else (ends or [None])[0],
        "pad_id": pad_id if pad_id is not None else (ends or [0])[0],
        "sampler": _sampler(settings, directory, "sampler" in chosen),
        "constraints": Constraints(**constraints)
        if any(x not in ((), None, 0) for x in constraints.values())
        else None,
    }


def _sampler(settings, directory, is_chosen):
    width = settings.get("num_beams") or 1
    if is_chosen:
        return None
    if settings.get("do_sample"):
        if width > 1:
            raise ValueError(
                f"`do_sample` with `num_beams`={width} in {directory}: there is no sampling with beams here."
            )
        top_k = settings.get("top_k", 50) or None
        return Sampling(settings.get("temperature") or 1.0, top_k, settings.get("top_p"))
    if width == 1:
        return Greedy()
    if settings.get("early_stopping"):
        raise ValueError(f"`early_stopping` in {directory} must be false for beam search here; received true.")
    length_penalty = settings.get("length_penalty")
    return BeamSearch(width, 1.0 if length_penalty is None else length_penalty)
