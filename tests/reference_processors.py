"""What transformers makes of scores, by the settings that it reads from a `generation_config.json`."""

import numpy as np


def processed(scores, settings, tokens, prompt_length, max_new_tokens, source=None, mask=None):
    """Scores after all processors and warpers, in the order in which `generate` applies them.

    Args:
        scores: float array `[B, vocabulary]`.
        settings: dict of fields of a `GenerationConfig`.
        tokens: int array `[B, T]`, the prompt and what was generated.
        prompt_length: int.
        max_new_tokens: int.
        source: int array `[B, S]`, what the encoder reads.
        mask: int array `[B, P]`, which tokens of the prompt of a decoder alone are real.
    """
    import torch
    from transformers import GenerationConfig, GenerationMixin

    class Model(GenerationMixin):
        config = type("Config", (), {"is_encoder_decoder": source is not None})

    settings = GenerationConfig(**{**settings, "max_length": prompt_length + max_new_tokens})
    ends = np.ravel(settings.eos_token_id if settings.eos_token_id is not None else []).astype("int64")
    settings._eos_token_tensor = torch.tensor(ends) if len(ends) else None
    processors = Model()._get_logits_processor(
        settings,
        prompt_length,
        encoder_input_ids=torch.tensor(np.asarray(tokens)[:, :prompt_length] if source is None else source).long(),
        device="cpu",
        model_kwargs={} if mask is None else {"attention_mask": torch.tensor(mask)},
    )
    return processors(torch.tensor(np.asarray(tokens)).long(), torch.tensor(scores)).numpy()
