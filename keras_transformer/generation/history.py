"""What the rows of a batch have read and written, for constraints that look back at it."""

import dataclasses

import numpy as np
from keras import ops


@dataclasses.dataclass(frozen=True)
class History:
    """The tokens of each row when its next one is chosen, in tensors of one size from the first token to the last.

    Padding is no part of a row: what a row may go on with does not depend on the rows beside it.

    Args:
        prompt: int tensor `[B, P]`, padded on the left.
        real: boolean tensor `[B, P]`: which of the prompt is no padding.
        new: int tensor `[B, max_new_tokens]`, of which the first `count` are known.
        count: scalar int tensor, or int.
        source: int tensor `[B, S]`: the tokens that the encoder reads.
        source_real: boolean tensor `[B, S]`: which of these are no padding.
    """

    prompt: object
    real: object
    new: object
    count: object
    source: object = None
    source_real: object = None

    def repeated(self, times):
        """The history of as many beams as `times` for each row."""
        names = ("prompt", "real", "new", "source", "source_real")
        tensors = {name: getattr(self, name) for name in names}
        tensors = {name: x if x is None else ops.repeat(x, times, axis=0) for name, x in tensors.items()}
        return dataclasses.replace(self, **tensors)

    def then(self, new, count):
        """The history with other new tokens."""
        return dataclasses.replace(self, new=new, count=count)

    @property
    def max_new_tokens(self):
        return self.new.shape[1]

    @property
    def tokens(self):
        """Prompt and new tokens, `[B, P + max_new_tokens]`."""
        return ops.concatenate([self.prompt, self.new], axis=1)

    @property
    def known(self):
        """Which of `tokens` there are by now."""
        new = ops.arange(self.max_new_tokens, dtype="int32") < self.count
        return ops.concatenate([self.real, ops.broadcast_to(new, ops.shape(self.new))], axis=1)

    @property
    def prompt_length(self):
        """How many tokens the prompt of each row has, `[B, 1]`."""
        return ops.sum(ops.cast(self.real, "int32"), axis=1, keepdims=True)

    @property
    def length(self):
        """How many tokens each row has by now, `[B, 1]`."""
        return self.prompt_length + self.count

    def last(self, back):
        """The last token of each row where `back` is 1, the one before it where it is 2, and so on: `[B, 1]`.

        A row with fewer tokens than that has something else there.
        """
        place = ops.shape(self.prompt)[1] + self.count - back
        return ops.take(self.tokens, ops.reshape(ops.maximum(place, 0), (1,)), axis=1)

    def repeats_itself(self, size, vocabulary):
        """Tokens that would end an n-gram which the row has already: boolean `[B, vocabulary]`."""
        return self._ends_of_ngrams(self.tokens, self.known, size, vocabulary)

    def repeats_source(self, size, vocabulary):
        """Tokens that would end an n-gram which the source has: boolean `[B, vocabulary]`."""
        return self._ends_of_ngrams(self.source, self.source_real, size, vocabulary)

    def contains(self, vocabulary):
        """Tokens that the row has: boolean `[B, vocabulary]`."""
        return marked(self.tokens, self.known, vocabulary)

    def completes(self, sequences, vocabulary):
        """Tokens that would end one of `sequences`, lists of ints: boolean `[B, vocabulary]`."""
        found = ops.zeros((ops.shape(self.prompt)[0], vocabulary), "bool")
        for size in sorted({len(sequence) for sequence in sequences}):
            alike = np.array([sequence for sequence in sequences if len(sequence) == size], "int32")
            matches = ops.broadcast_to(self.length >= size - 1, (ops.shape(found)[0], len(alike)))
            for back in range(1, size):
                matches = ops.logical_and(matches, self.last(back) == ops.convert_to_tensor(alike[:, -1 - back]))
            ends = ops.broadcast_to(ops.convert_to_tensor(alike[:, -1]), ops.shape(matches))
            found = ops.logical_or(found, marked(ends, matches, vocabulary))
        return found

    def following(self, size):
        """Which tokens follow the same `size` tokens as the next one will: boolean `[B, P + max_new_tokens]`."""
        return self._following(self.tokens, self.known, size)

    def _ends_of_ngrams(self, tokens, known, size, vocabulary):
        return marked(tokens, self._following(tokens, known, size - 1), vocabulary)

    def _following(self, tokens, known, size):
        place = ops.arange(ops.shape(tokens)[1], dtype="int32")
        found = ops.logical_and(known, ops.logical_and(place >= size, self.length >= size))
        for back in range(1, size + 1):
            same = ops.logical_and(ops.roll(known, back, axis=1), ops.roll(tokens, back, axis=1) == self.last(back))
            found = ops.logical_and(found, same)
        return found


def marked(tokens, where, vocabulary):
    """Which of the vocabulary are among `tokens` `[B, L]` at the places `where` `[B, L]`: boolean `[B, vocabulary]`."""
    rows = ops.shape(tokens)[0]
    # All others, and what the vocabulary of the output does not have, go to a column that is cut off.
    columns = ops.where(where, ops.minimum(ops.cast(tokens, "int32"), vocabulary), vocabulary)
    rows_of = ops.broadcast_to(ops.expand_dims(ops.arange(rows, dtype="int32"), 1), ops.shape(columns))
    indices = ops.reshape(ops.stack([rows_of, columns], axis=-1), (-1, 2))
    marks = ops.zeros((rows, vocabulary + 1), "int32")
    ones = ops.ones((ops.shape(indices)[0],), "int32")
    return ops.scatter_update(marks, indices, ones)[:, :vocabulary] > 0
