"""Loops whose cache grows: each step reads all of it, so it has to be as small as what there is to keep."""

from keras import ops

from keras_transformer.scopes import grown

NEW_SLOTS = 128  # A stage more for each so many new slots: compiling one takes as long as thousands of steps save.
MOST = 4
ALIGNED = 16


class Stages:
    """The stages of a loop over new tokens, each of which ends where its cache is full.

    Args:
        start: int or scalar int tensor. Slots of the cache that the prompt takes.
        width: int. Slots that each new token takes: the number of beams.
        count: int. How many new tokens there are at most.
        growing: boolean. False for a single stage.
    """

    def __init__(self, start, width, count, growing=True):
        self.start = start
        self.width = width
        # The first token is there before the first step, so a stage that ends with it would have none.
        number = max(1, min(MOST, width * count // NEW_SLOTS, count - 1)) if growing else 1
        self.stops = [-(-count * (stage + 1) // number) for stage in range(number)]

    def room(self, stop):
        """How many slots there must be until there are `stop` new tokens, the last of which is not read."""
        slots = self.start + self.width * max(1, stop - 1)  # JAX traces a step that is never taken as well.
        return -(-slots // ALIGNED) * ALIGNED

    def loop(self, unfinished, advance, state):
        """`ops.while_loop` over a state that begins with the number of new tokens so far, and ends with the cache."""
        for stop in self.stops:
            if stop != self.stops[0]:
                state = (*state[:-1], grown(state[-1], self.room(stop)))
            state = ops.while_loop(_before(stop, unfinished), advance, state)
        return state


def _before(stop, unfinished):
    return lambda i, *rest: ops.logical_and(i < stop, unfinished(i, *rest))
