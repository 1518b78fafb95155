"""How much faster tokens come with the key-value cache than without.

    python benchmarks/generation_cache.py --tokens 256

Both ways are one compiled loop on the same model and give the same tokens; the one without a cache runs the whole
sequence again for each token. They alternate, and the ratio of their medians counts: times on a shared machine vary.
"""

import argparse
import statistics
import time

import keras
import numpy as np
from keras import ops
from side_by_side import tell

import keras_transformer as kt
from keras_transformer.generation.compilation import can_jit, compile_function


def build_model(vocabulary, dim, depth, num_heads):
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    x = kt.layers.PositionalEmbedding()(keras.layers.Embedding(vocabulary, dim)(tokens))
    for _ in range(depth):
        x = kt.layers.DecoderBlock(num_heads, 4 * dim)(x)
    return keras.Model(tokens, keras.layers.Dense(vocabulary)(keras.layers.LayerNormalization()(x)))


def without_cache(model, prompt_length, count):
    """Greedy decoding that computes every position anew at each step."""

    def loop(tensors):
        prompt = tensors["prompt"]
        tokens = ops.pad(prompt, ((0, 0), (0, count)))

        def body(i, tokens):
            logits = ops.take(model(tokens), i - 1, axis=1)
            chosen = ops.cast(ops.argmax(logits, axis=-1), "int32")
            return i + 1, ops.slice_update(tokens, (0, i), ops.expand_dims(chosen, 1))

        end = prompt_length + count
        start = ops.convert_to_tensor(prompt_length, "int32")
        return ops.while_loop(lambda i, _: i < end, body, (start, tokens))[1][:, prompt_length:]

    signature = {"prompt": keras.KerasTensor((None, prompt_length), "int32")}
    return compile_function(loop, model.variables, signature, can_jit())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 256), ("prompt", 32), ("batch", 1), ("dim", 256), ("depth", 4), ("heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed (default: 5)")
    parser.add_argument("--output", help="file to write the result to, as JSON")
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    model = build_model(8000, arguments.dim, arguments.depth, arguments.heads)
    prompt = np.random.default_rng(0).integers(3, 8000, (arguments.batch, arguments.prompt)).astype("int32")
    generator = kt.generation.Generator(model)
    plain = without_cache(model, arguments.prompt, arguments.tokens)
    ways = {
        "with cache": lambda: generator.generate(prompt, arguments.tokens),
        "without": lambda: ops.convert_to_numpy(plain({"prompt": ops.convert_to_tensor(prompt)})),
    }
    first = {name: way() for name, way in ways.items()}  # compiles
    same = float((first["with cache"] == first["without"]).mean())
    seconds = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "backend": keras.backend.backend(),
        **{name: value for name, value in vars(arguments).items() if name != "output"},
        "seconds": {name: [round(x, 3) for x in times] for name, times in seconds.items()},
        "same_tokens": same,
        "ratio": round(medians["without"] / medians["with cache"], 2),
    }
    tell(result, arguments.output)


if __name__ == "__main__":
    main()
