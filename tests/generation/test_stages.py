"""A cache that grows in stages holds the same as one that has room for all tokens from the beginning."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from small_models import MODELS, inputs_for, token_input

from keras_transformer.generation import BeamSearch, Generator, Greedy, Sampling, stages
from keras_transformer.generation.stages import Stages

SAMPLERS = {"greedy": Greedy(), "sampling": Sampling(seed=3), "beams": BeamSearch(3)}
ROWS = {"three": [[5, 9, 4, 8, 6], [7], [3, 3, 11]], "one": [[5, 9, 4, 8, 6]]}
COUNT = 10
built = functools.cache(lambda name: MODELS[name]())


def generate(model, rows, sampler, jit, monkeypatch, new_slots):
    """The tokens, and where the cache of each loop was full."""
    loops, loop = [], Stages.loop
    monkeypatch.setattr(stages, "NEW_SLOTS", new_slots)
    monkeypatch.setattr(stages, "ALIGNED", 1)
    monkeypatch.setattr(Stages, "loop", lambda self, *rest: loops.append(self.stops) or loop(self, *rest))
    generator = Generator(model, start_id=1, sampler=sampler, jit_compile=jit)
    inputs = {**inputs_for(model, len(ROWS[rows])), token_input(model): ROWS[rows]}
    tokens = generator.generate(inputs, COUNT)
    monkeypatch.undo()
    return tokens, loops[-1]


CASES = [
    (name, rows, sampler, jit)
    for name, rows, jit in (("two encoders by hand", "three", False), ("rotary, grouped", "one", True))
    for sampler in SAMPLERS
    if not jit or keras.backend.backend() != "torch"
]


@pytest.mark.parametrize(("name", "rows", "sampler", "jit"), CASES)
def test_tokens_are_those_of_a_single_stage(name, rows, sampler, jit, monkeypatch):
    model = built(name)
    wanted, stops = generate(model, rows, SAMPLERS[sampler], jit, monkeypatch, 1000)
    assert stops == [COUNT]
    found, stops = generate(model, rows, SAMPLERS[sampler], jit, monkeypatch, 3)
    assert len(stops) > 2 and stops[-1] == COUNT
    np.testing.assert_array_equal(found, wanted)


def test_there_is_room_for_what_each_stage_keeps():
    assert (Stages(32, 1, 64).stops, Stages(32, 1, 256).stops, Stages(32, 1, 256, growing=False).stops) == (
        [64], [128, 256], [256],
    )  # fmt: skip
    beams = Stages(1, 4, 65)
    # The last token of a stage is read in the next one, or never.
    assert beams.stops == [33, 65] and [beams.room(stop) for stop in beams.stops] == [1 + 4 * 32 + 15, 1 + 4 * 64 + 15]
    assert Stages(2, 256, 4).stops == [2, 3, 4] and Stages(2, 256, 1).stops == [1]
    assert [Stages(2, 256, count).room(count) for count in (1, 2, 3)] == [272, 272, 528]
    assert Stages(7, 1, 100_000).stops == [25_000, 50_000, 75_000, 100_000]


def test_rows_that_have_ended_take_no_more_steps():
    def advance(i, ended, cache):
        return i + 1, i >= 2, cache

    state = (ops.convert_to_tensor(1), ops.convert_to_tensor(False), {})
    state = Stages(0, 1, 512).loop(lambda i, ended, cache: ops.logical_not(ended), advance, state)
    assert int(state[0]) == 3


def test_a_sampler_that_knows_no_stages_has_room_for_all_tokens(monkeypatch):
    class Own(Greedy):
        def search(self, step, logits, cache, max_new_tokens, end_id, pad_id, seed):
            return super().search(step, logits, cache, max_new_tokens, end_id, pad_id, seed)

    model = built("two encoders by hand")
    wanted, _ = generate(model, "three", Greedy(), False, monkeypatch, 1000)
    monkeypatch.setattr(stages, "NEW_SLOTS", 3)
    inputs = {**inputs_for(model, 3), token_input(model): ROWS["three"]}
    found = Generator(model, start_id=1, sampler=Own(), jit_compile=False).generate(inputs, COUNT)
    np.testing.assert_array_equal(found, wanted)
