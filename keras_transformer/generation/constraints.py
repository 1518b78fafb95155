"""What must or must not be generated, whatever the model says."""

import keras
import numpy as np
from keras import ops

FORBIDDEN = -1e30


@keras.saving.register_keras_serializable(package="keras_transformer")
class Constraints:
    """What checkpoints ask for in their generation settings: tokens forbidden, forced, or less likely than they were.

    Scores pass through them in this order, which is that of Hugging Face: the penalty for repetition; what is forbidden
    because of the tokens so far; what is forced; what is suppressed; and last they are normalized again. Scores are
    logits, or log-probabilities in beam search.

    A row is treated as it would be alone: padding counts neither as a token that could repeat nor in a length. (Hugging
    Face counts it in `min_length` and as a part of n-grams, so that a row's text depends on the rows beside it.)

    Args:
        suppressed: ints. Tokens that are never generated.
        suppressed_first: ints. Tokens that are not generated at the first place, or at the second where
            `forced_first` holds for the first.
        forced_first: int. The token that is generated after a prompt of one token, the start, or None.
        forced_last: int, or list of ints. What is generated at the last place, or None.
        min_new_tokens: int. How many tokens are generated before one that ends the row.
        min_length: int. How many tokens a row has, its prompt included, before one that ends it.
        forbidden_sequences: lists of ints. What is never generated whole; of one token, what is never generated unless
            it ends the row.
        repetition_penalty: float. How much less likely a token becomes that the row has already, its prompt included: a
            positive score is divided by it, a negative one multiplied. 1 changes nothing.
        no_repeat_ngram_size: int. No sequence of as many tokens appears twice in a row, its prompt included; 0 for all
            may.
        no_repeat_source_ngram_size: int. No sequence of as many tokens is copied from the source, which is the prompt
            where there is no encoder; 0 for all may be.
        renormalize: boolean. Whether the probabilities of what is left add up to 1 again, which matters to the sums of
            beam search.

    Raises:
        ValueError: if a number is negative, `repetition_penalty` is 0 or less, a forbidden sequence is empty, or what
            is forced is suppressed.

    References: [CTRL](https://arxiv.org/abs/1909.05858), section 4.1, for the penalty;
    [A Deep Reinforced Model for Abstractive Summarization](https://arxiv.org/abs/1705.04304), section 2.5, for n-grams.

    Example:

    >>> import keras_transformer as kt
    >>> constraints = kt.generation.Constraints(suppressed=[5], no_repeat_ngram_size=3)
    >>> constraints.get_config()["no_repeat_ngram_size"]
    3
    """

    def __init__(
        self,
        suppressed=(),
        suppressed_first=(),
        forced_first=None,
        forced_last=None,
        min_new_tokens=0,
        min_length=0,
        forbidden_sequences=(),
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        no_repeat_source_ngram_size=0,
        renormalize=False,
    ):
        self.suppressed = list(suppressed)
        self.suppressed_first = list(suppressed_first)
        self.forced_first = forced_first
        self.forced_last = forced_last
        self.min_new_tokens = min_new_tokens
        self.min_length = min_length
        self.forbidden_sequences = [list(sequence) for sequence in forbidden_sequences]
        self.repetition_penalty = repetition_penalty
        self.no_repeat_ngram_size = no_repeat_ngram_size
        self.no_repeat_source_ngram_size = no_repeat_source_ngram_size
        self.renormalize = renormalize
        numbers = [
            *self.suppressed, *self.suppressed_first, *end_tokens(forced_first), *end_tokens(forced_last),
            *sum(self.forbidden_sequences, []), min_new_tokens, min_length, no_repeat_ngram_size,
            no_repeat_source_ngram_size,
        ]  # fmt: skip
        if min(numbers) < 0:
            raise ValueError(f"Tokens and their number must not be negative; received {self.get_config()}.")
        for name, forced in (("forced_first", forced_first), ("forced_last", forced_last)):
            if forced is not None and set(end_tokens(forced)) <= set(self.suppressed):
                raise ValueError(f"A token of `{name}` must not be in `suppressed`; received {forced} in both.")
        if repetition_penalty <= 0:
            raise ValueError(f"`repetition_penalty` must be positive; received {repetition_penalty}.")
        if not all(self.forbidden_sequences):
            raise ValueError(
                f"`forbidden_sequences` must have at least a token each; received {self.forbidden_sequences}."
            )

    def apply(self, scores, history, end_id):
        """Scores of the next tokens as they count.

        Args:
            scores: float tensor `[B, vocabulary]`.
            history: `History`, with the tokens of each row so far.
            end_id: int, sequence of ints or None. What ends a row.

        Returns:
            Float tensor `[B, vocabulary]`, with those of forbidden tokens at -1e30.
        """
        size = scores.shape[-1]
        if self.repetition_penalty != 1:
            penalty = self.repetition_penalty
            penalized = ops.where(scores < 0, scores * penalty, scores / penalty)
            scores = ops.where(history.contains(size), penalized, scores)
        for forbidden in self._forbidden(history, end_tokens(end_id), size):
            scores = lower(scores, forbidden)
        for tokens, now in (
            (end_tokens(self.forced_first), history.length == 1),
            (end_tokens(self.forced_last), history.count == history.max_new_tokens - 1),
        ):
            if tokens:  # A forced token is certain: it costs a beam nothing.
                only = ops.where(members(tokens, size), 0.0, FORBIDDEN)
                scores = ops.where(now, ops.cast(only, scores.dtype), scores)
        if self.suppressed:
            scores = lower(scores, members(self.suppressed, size))
        if self.suppressed_first:
            forced = 0 if self.forced_first is None else ops.cast(history.prompt_length == 1, "int32")
            scores = lower(scores, members(self.suppressed_first, size), history.count == forced)
        return ops.log_softmax(scores, axis=-1) if self.renormalize else scores

    def _forbidden(self, history, ends, size):
        """What the tokens so far forbid, each as a boolean tensor `[1|B, vocabulary]`."""
        if self.no_repeat_ngram_size:
            yield history.repeats_itself(self.no_repeat_ngram_size, size)
        if self.no_repeat_source_ngram_size:
            yield history.repeats_source(self.no_repeat_source_ngram_size, size)
        sequences = [sequence for sequence in self.forbidden_sequences if sequence not in [[end] for end in ends]]
        single = [sequence[0] for sequence in sequences if len(sequence) == 1]
        longer = [sequence for sequence in sequences if len(sequence) > 1]
        if single:
            yield members(single, size)
        if longer:
            yield history.completes(longer, size)
        for least, length in ((self.min_length, history.length), (self.min_new_tokens, history.count)):
            if least and ends:
                yield ops.logical_and(members(ends, size), length < least)

    def get_config(self):
        return {
            "suppressed": self.suppressed,
            "suppressed_first": self.suppressed_first,
            "forced_first": self.forced_first,
            "forced_last": self.forced_last,
            "min_new_tokens": self.min_new_tokens,
            "min_length": self.min_length,
            "forbidden_sequences": self.forbidden_sequences,
            "repetition_penalty": self.repetition_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "no_repeat_source_ngram_size": self.no_repeat_source_ngram_size,
            "renormalize": self.renormalize,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def end_tokens(end_id):
    """The tokens that end a row: none, one, or several."""
    if end_id is None:
        return []
    return list(end_id) if isinstance(end_id, list | tuple) else [end_id]


def lower(scores, forbidden, when=True):
    """Scores with those at the bottom that are `forbidden`, a boolean tensor, where `when` holds."""
    return ops.where(ops.logical_and(forbidden, when), ops.cast(FORBIDDEN, scores.dtype), scores)


def members(tokens, size):
    """Boolean tensor `[size]`, True at `tokens`."""
    return ops.convert_to_tensor(np.isin(np.arange(size), tokens))


def is_one_of(chosen, tokens):
    """Whether each of the `chosen` is one of `tokens`, a list of ints."""
    found = ops.zeros_like(chosen, dtype="bool")
    for token in tokens:
        found = ops.logical_or(found, chosen == token)
    return found
