"""What can be drawn is what transformers leaves to be drawn with the same settings."""

import numpy as np
import pytest
from harness import as_numpy, compiled
from keras import ops
from reference_processors import processed

from keras_transformer.generation import Sampling
from keras_transformer.generation.samplers import StepSeed

WAYS = {"eager": lambda function: function, "compiled": compiled}  # XLA cuts and draws by other means on a CPU.

CASES = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 500},
    {"top_p": 0.8},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"typical_p": 0.05},
    {"typical_p": 0.3},
    {"typical_p": 0.9},
    {"typical_p": 1.0},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.8},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_scores_are_cut_as_transformers_cuts_them(options, way):
    random = np.random.default_rng(0)
    scores = (random.normal(size=(16, 50)) * random.uniform(0.1, 4, (16, 1))).astype("float32")
    scores[:, 7] = -np.inf  # Forbidden before.
    wanted = processed(scores, {"do_sample": True, **options}, np.zeros((16, 1), int), 1, 4)
    ours = np.where(np.isfinite(scores), scores, -1e30)
    found = as_numpy(WAYS[way](Sampling(**options).cut)(ops.convert_to_tensor(ours) / options.get("temperature", 1.0)))
    np.testing.assert_array_equal(found > -1e29, np.isfinite(wanted))
    np.testing.assert_allclose(found[np.isfinite(wanted)], wanted[np.isfinite(wanted)], rtol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_parameters_of_a_call_cut_as_settings_do(way):
    scores = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(8, 50)).astype("float32"))
    for top_k, top_p in ((0, 1.0), (5, 1.0), (500, 0.5), (20, 0.8)):

        def cut(scores, top_k, top_p):
            parameters = {"temperature": 1.0, "top_k": top_k, "top_p": top_p, "max_new_tokens": 1}
            return Sampling().with_parameters(parameters).cut(scores)

        tensors = ops.convert_to_tensor(top_k, "int32"), ops.convert_to_tensor(top_p, "float32")
        wanted = Sampling(top_k=top_k or None, top_p=top_p).cut(scores)
        np.testing.assert_array_equal(as_numpy(WAYS[way](cut)(scores, *tensors)), as_numpy(wanted))


@pytest.mark.parametrize("way", WAYS)
def test_equal_scores_are_kept_or_cut_together(way):
    scores = np.array([[1.0, 3, 2, 2, -0.0, 0.0, -1, -1e30]], "float32")
    for options, kept in (({"top_k": 2}, 3), ({"top_k": 5}, 6), ({"top_p": 0.6}, 3), ({"top_p": 0.3}, 1)):
        found = as_numpy(WAYS[way](Sampling(**options).cut)(ops.convert_to_tensor(scores)))
        np.testing.assert_array_equal((found > -1e29).sum(), kept, err_msg=str(options))


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_drawn_as_often_as_they_are_probable(way):
    probabilities = np.array([0.5, 0.25, 0.15, 0.09, 0.0099, 0.0001])
    rows, steps = 2**13, 8
    logits = ops.convert_to_tensor(np.log(probabilities)[None].repeat(rows, 0).astype("float32"))
    choose = WAYS[way](lambda logits, seed, step: Sampling().choose(logits, StepSeed(seed, step)))

    def drawn(seed, step):
        return as_numpy(choose(logits, *(ops.convert_to_tensor(x, "int32") for x in (seed, step))))

    tokens = np.stack([drawn(3, step) for step in range(steps)])
    share = (tokens[..., None] == np.arange(6)).mean(axis=(0, 1))
    assert (np.abs(share - probabilities) < 5 * (probabilities / tokens.size) ** 0.5).all(), share
    # Rows, steps and seeds draw independently of one another: as often the same as chance has it.
    same = (probabilities**2).sum()
    for other in (
        np.roll(tokens, 1, axis=1),
        np.roll(tokens, 1, axis=0),
        np.stack([drawn(4, i) for i in range(steps)]),
    ):
        assert abs((tokens == other).mean() - same) < 5 * (same / tokens.size) ** 0.5
    np.testing.assert_array_equal(drawn(3, 0), tokens[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_p": -0.1}, "`min_p` must be from 0 to 1; received min_p=-0.1"),
        ({"min_p": 1.1}, "`min_p`"),
        ({"typical_p": 0.0}, "`typical_p` must be greater than 0 and at most 1; received typical_p=0.0"),
        ({"typical_p": 1.1}, "`typical_p`"),
    ],
)
def test_bad_input_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
