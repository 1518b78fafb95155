"""What can be drawn is what transformers leaves to be drawn with the same settings."""

import numpy as np
import pytest
from keras import ops
from reference_processors import processed

from keras_transformer.generation import Sampling

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


@pytest.mark.parametrize("options", CASES, ids=str)
def test_scores_are_cut_as_transformers_cuts_them(options):
    random = np.random.default_rng(0)
    scores = (random.normal(size=(16, 50)) * random.uniform(0.1, 4, (16, 1))).astype("float32")
    scores[:, 7] = -np.inf  # Forbidden before.
    wanted = processed(scores, {"do_sample": True, **options}, np.zeros((16, 1), int), 1, 4)
    ours = np.where(np.isfinite(scores), scores, -1e30)
    found = ops.convert_to_numpy(Sampling(**options).cut(ops.convert_to_tensor(ours) / options.get("temperature", 1.0)))
    np.testing.assert_array_equal(found > -1e29, np.isfinite(wanted))
    np.testing.assert_allclose(found[np.isfinite(wanted)], wanted[np.isfinite(wanted)], rtol=1e-6)


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
