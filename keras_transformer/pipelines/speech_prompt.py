"""What the decoder of Whisper begins with: the language of the speech, what to do with it, and no time stamps."""

from pathlib import Path

from keras import ops

from keras_transformer.pretrained.checkpoint import read_json


class SpeechPrompt:
    """The tokens that a decoder of speech begins with, the same for all sounds but for the language.

    Args:
        tokens: ints, with None in the place of a language that the model is to detect.
        language_ids: ints, the tokens of the languages to choose from.

    Reference: [Robust Speech Recognition via Large-Scale Weak Supervision](https://arxiv.org/abs/2212.04356),
    section 2.3.

    Example:

    >>> import numpy as np
    >>> prompt = SpeechPrompt([7, 8, 9])
    >>> keras.ops.convert_to_numpy(prompt(None, np.zeros((2, 30, 8)))).tolist()
    [[7, 8, 9], [7, 8, 9]]
    """

    def __init__(self, tokens, language_ids=()):
        self.tokens = list(tokens)
        self.language_ids = sorted(language_ids)

    def __call__(self, model, features):
        """The beginnings for a batch of features `[B, frames, mels]`: int32 tensor `[B, tokens]`."""
        batch = ops.shape(features)[0]
        columns = [
            self._detected(model, features) if token is None else ops.full((batch, 1), token, dtype="int32")
            for token in self.tokens
        ]
        return ops.concatenate(columns, axis=1)

    @classmethod
    def from_directory(cls, directory, language=None, task=None):
        """The beginning that a checkpoint asks for.

        Args:
            directory: path of the checkpoint directory.
            language: str. Code of the language that is spoken, such as `"en"`. By default, a model of many languages
                detects it.
            task: str. `"transcribe"` or `"translate"` (to English). By default what the settings say.

        Raises:
            ValueError: if the checkpoint does not know the language or the task, or is of one language alone.
        """
        configuration = read_json(directory, "config.json")
        has_settings = (Path(directory) / "generation_config.json").is_file()
        settings = read_json(directory, "generation_config.json") if has_settings else configuration
        if settings.get("return_timestamps"):
            raise ValueError(f"`return_timestamps` in {directory} must be false: there are no time stamps here.")
        if settings.get("is_multilingual") is False and (language or task):
            raise ValueError(
                f"`language` and `task` must not be given for a checkpoint of one language; received {language!r} and "
                f"{task!r}."
            )
        language = language or settings.get("language")
        task = task or settings.get("task")
        languages, tasks = settings.get("lang_to_id") or {}, settings.get("task_to_id") or {}
        start = settings.get("decoder_start_token_id", configuration.get("decoder_start_token_id"))
        forced = settings.get("forced_decoder_ids") or configuration.get("forced_decoder_ids") or []
        tokens = [start]
        if not language and not task:
            tokens += _in_a_row(forced)
        elif language:
            tokens += [_chosen(languages, f"<|{language.lower().strip('<|>')}|>", "language", language)]
            tokens += [_chosen(tasks, task or "transcribe", "task", task)] if tasks or task else []
        else:
            tokens += [None, _chosen(tasks, task, "task", task)]
        if len(tokens) == 1 and languages:
            tokens.append(None)
        silent = settings.get("no_timestamps_token_id")
        if silent is not None and tokens[-1] != silent:
            tokens.append(silent)
        return cls(tokens if languages else [token for token in tokens if token is not None], languages.values())

    def _detected(self, model, features):
        """The likeliest language of each sound: int32 `[B, 1]`."""
        start = ops.full((ops.shape(features)[0], 1), self.tokens[0], dtype="int32")
        logits = model({"features": ops.convert_to_tensor(features), "target_ids": start})[:, -1]
        ids = ops.convert_to_tensor(self.language_ids, "int32")
        return ops.expand_dims(ops.take(ids, ops.argmax(ops.take(logits, ids, axis=-1), axis=-1)), -1)


def _in_a_row(forced):
    """The tokens of pairs of a place and a token, which must be the places from 1 on."""
    places = [place for place, _ in forced]
    if places != list(range(1, len(places) + 1)):
        raise ValueError(f"`forced_decoder_ids` must give the places from 1 on, in order; received {forced}.")
    return [token for _, token in forced]


def _chosen(ids, key, name, received):
    if key not in ids:
        known = ", ".join(sorted(key.strip("<|>") for key in ids)) or "none"
        raise ValueError(f"`{name}` must be one that the checkpoint knows ({known}); received {received!r}.")
    return ids[key]
