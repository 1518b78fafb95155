"""The configuration of a checkpoint, read so that no field is ever overlooked."""

import warnings

# What says nothing about the computation, in any family: bookkeeping, defaults of generation, and how weights begin.
NEVER_MATTERS = frozenset(
    """
    _commit_hash _name_or_path architectures bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    custom_pipelines diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_decoder_ids forced_eos_token_id
    gradient_checkpointing id2label initializer_factor initializer_range init_std is_encoder_decoder label2id
    length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()
)


class Fields:
    """A configuration whose every field is used, declared to be irrelevant, or refused.

    Args:
        values: dict. What `config.json` holds.
        family: str. Name of the family, for the errors.
        path: str. Where `values` stands in a larger configuration (`"text_config."`), for the errors.

    Example:

    >>> fields = Fields({"hidden_size": 64, "is_decoder": True}, "bert")
    >>> fields.take("hidden_size"), fields.take("layer_norm_eps", default=1e-12)
    (64, 1e-12)
    >>> fields.only("is_decoder", False)
    Traceback (most recent call last):
    ...
    ValueError: `is_decoder` of a bert checkpoint must be False here; received True.
    """

    def __init__(self, values, family, path=""):
        self.values = values
        self.family = family
        self._path = path
        self._known = set()
        self._parts = []

    def take(self, *names, default=None):
        """The value of a field, which may have several spellings, or `default` where it is missing or null."""
        self._known.update(names)
        return next((self.values[name] for name in names if self.values.get(name) is not None), default)

    def fill(self, defaults):
        """Gives the fields that are missing the values that the family has for them, in a dict."""
        self.values = {**defaults, **self.values}

    def nullable(self, name, default):
        """The value of a field whose null has a meaning of its own: `default` only where it is missing."""
        self._known.add(name)
        return self.values.get(name, default)

    def need(self, *names):
        """The value of a field without which there is no model."""
        value = self.take(*names)
        if value is None:
            raise ValueError(
                f"The configuration of a {self.family} checkpoint must have `{self._path}{names[0]}`; received "
                f"{sorted(self.values)}."
            )
        return value

    def one_of(self, name, choices, default=None):
        """The value of a field, held to what there is an implementation of."""
        value = self.take(name, default=default)
        if value not in choices:
            raise ValueError(
                f"`{self._path}{name}` of a {self.family} checkpoint must be one of {sorted(choices, key=str)} here; "
                f"received {value!r}."
            )
        return value

    def only(self, name, value, *others):
        """Refuses all values of a field but those given, the first of which is the default."""
        received = self.take(name, default=value)
        if received not in (value, *others):
            wanted = " or ".join(map(repr, (value, *others)))
            raise ValueError(
                f"`{self._path}{name}` of a {self.family} checkpoint must be {wanted} here; received {received!r}."
            )

    def ignore(self, names):
        """Declares fields, in a string with spaces, that do not change what the model computes."""
        self._known.update(names.split())

    def part(self, name, family=None):
        """The fields of a nested configuration."""
        part = Fields(self.need(name), family or self.family, f"{self._path}{name}.")
        self._parts.append(part)
        return part

    def unknown(self):
        """Fields that nobody asked for, sorted."""
        own = {self._path + name for name in set(self.values) - self._known - NEVER_MATTERS}
        return sorted(own.union(*(part.unknown() for part in self._parts)))

    def warn_of_unknown(self, source=None, subject="the computation", stacklevel=3):
        """Says which fields have no meaning here: they may come from a later version of the family.

        Args:
            source: str. What has the fields; by default the configuration of the family's checkpoint.
            subject: str. What they might change.
            stacklevel: int, as in `warnings.warn`.
        """
        if self.unknown():
            warnings.warn(
                f"{source or f'The configuration of the {self.family} checkpoint'} has fields that are unknown here, "
                f"and have no effect: {self.unknown()}. If one of them changes {subject}, outputs will be wrong.",
                stacklevel=stacklevel,
            )
