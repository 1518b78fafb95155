import keras
import numpy as np
import pytest
from keras import ops

import keras_transformer as kt
from keras_transformer.generation.graph import DecodingGraph

VOCABULARY = 12


def tail_of(name):
    def tied(x, embedding):
        return embedding(keras.layers.RMSNormalization()(x), reverse=True)

    tails = {
        "dense": lambda x, embedding: keras.layers.Dense(VOCABULARY)(keras.layers.LayerNormalization()(x)),
        "tied": tied,
        "biased": lambda x, embedding: kt.layers.Bias("normal")(tied(keras.layers.Rescaling(0.5)(x), embedding)),
        "capped": lambda x, embedding: ops.tanh(tied(x, embedding) / 3.0) * 3.0,
        "over positions": lambda x, embedding: keras.layers.Dense(VOCABULARY)(
            keras.layers.LayerNormalization(axis=[1, 2])(x)
        ),
        "unknown": lambda x, embedding: tied(x, embedding) * ops.cumsum(ops.ones_like(tied(x, embedding)), axis=1),
    }
    keras.utils.set_random_seed(3)
    tokens = keras.Input((6,), dtype="int32", name="token_ids")
    embedding = keras.layers.ReversibleEmbedding(VOCABULARY, 16)
    return keras.Model(tokens, tails[name](kt.layers.DecoderBlock(2, 24)(embedding(tokens)), embedding))


@pytest.mark.parametrize(
    "name, positions", [("dense", 1), ("tied", 1), ("biased", 1), ("capped", 1), ("over positions", 1), ("unknown", 6)]
)
def test_a_prompt_has_its_last_logits_alone_where_the_last_layers_allow_it(name, positions, monkeypatch):
    graph = DecodingGraph(tail_of(name))
    prompt = np.array([[4, 9, 3, 7, 5, 8], [6, 4, 4, 9, 7, 3]], "int32")
    wanted = ops.convert_to_numpy(graph.decode(prompt, [])[:, -1:])
    seen = []

    def watch(kind):
        call = kind.call

        def watched(self, x, *args, **options):
            seen.append(x.shape[1])
            return call(self, x, *args, **options)

        monkeypatch.setattr(kind, "call", watched)

    watch(keras.layers.Dense)
    watch(keras.layers.ReversibleEmbedding)
    np.testing.assert_allclose(ops.convert_to_numpy(graph.decode(prompt, [], last=True)), wanted, rtol=1e-5, atol=1e-6)
    assert seen[-1] == positions
