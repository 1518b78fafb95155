"""What must or must not be generated, whatever the model says."""

import keras
import numpy as np
from keras import ops

FORBIDDEN = -1e30


@keras.saving.register_keras_serializable(package="keras_transformer")
class Constraints:
    """Tokens that are forbidden or forced, as checkpoints ask for in their generation settings.

    Args:
        suppressed: ints. Tokens that are never generated.
        suppressed_first: ints. Tokens that are not generated at the first place.
        forced_first: int. The token that is generated at the first place, or None.
        forced_last: int. The token that is generated at the last place, or None.
        min_new_tokens: int. How many tokens are generated before one that ends the row.

    Raises:
        ValueError: if a number is negative.

    Example:

    >>> import keras_transformer as kt
    >>> constraints = kt.generation.Constraints(suppressed=[5], forced_first=3)
    >>> constraints.get_config()["forced_first"]
    3
    """

    def __init__(self, suppressed=(), suppressed_first=(), forced_first=None, forced_last=None, min_new_tokens=0):
        self.suppressed = list(suppressed)
        self.suppressed_first = list(suppressed_first)
        self.forced_first = forced_first
        self.forced_last = forced_last
        self.min_new_tokens = min_new_tokens
        forced = [token for token in (forced_first, forced_last) if token is not None]
        numbers = [*self.suppressed, *self.suppressed_first, *forced, min_new_tokens]
        if min(numbers) < 0:
            raise ValueError(f"Tokens and their number must not be negative; received {self.get_config()}.")

    def apply(self, scores, position, max_new_tokens, end_id):
        """Scores `[B, vocabulary]` of the new token number `position`, those of forbidden tokens at the bottom."""
        size = scores.shape[-1]

        def lower(scores, forbidden, when=True):
            return ops.where(ops.logical_and(forbidden, when), ops.cast(FORBIDDEN, scores.dtype), scores)

        if self.suppressed:
            scores = lower(scores, members(self.suppressed, size))
        if self.suppressed_first:
            scores = lower(scores, members(self.suppressed_first, size), position == 0)
        if self.min_new_tokens and end_id is not None:
            scores = lower(scores, members(end_tokens(end_id), size), position < self.min_new_tokens)
        for token, place in ((self.forced_first, 0), (self.forced_last, max_new_tokens - 1)):
            if token is not None:  # A forced token is certain: it costs a beam nothing.
                only = ops.where(members([token], size), 0.0, ops.cast(FORBIDDEN, scores.dtype))
                scores = ops.where(position == place, ops.cast(only, scores.dtype), scores)
        return scores

    def get_config(self):
        return {
            "suppressed": self.suppressed,
            "suppressed_first": self.suppressed_first,
            "forced_first": self.forced_first,
            "forced_last": self.forced_last,
            "min_new_tokens": self.min_new_tokens,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def end_tokens(end_id):
    """The tokens that end a row: none, one, or several."""
    if end_id is None:
        return []
    return list(end_id) if isinstance(end_id, list | tuple) else [end_id]


def members(tokens, size):
    """Boolean tensor `[size]`, True at `tokens`."""
    return ops.convert_to_tensor(np.isin(np.arange(size), tokens))


def is_one_of(chosen, tokens):
    """Whether each of the `chosen` is one of `tokens`, a list of ints."""
    found = ops.zeros_like(chosen, dtype="bool")
    for token in tokens:
        found = ops.logical_or(found, chosen == token)
    return found
