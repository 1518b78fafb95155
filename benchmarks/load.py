"""Time and memory of loading a checkpoint, against KerasHub: a synthetic LLaMA of about a gigabyte.

    python benchmarks/load.py --output load.json

Each loading runs in a process of its own, the two libraries in turn. Memory is the highest resident size, mapped pages
of the file included, above what the process had after its imports.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
}


def write(directory, layers):
    """Writes the checkpoint and returns its size in bytes."""
    from keras_transformer.pretrained.checkpoint import write_checkpoint

    random = np.random.default_rng(0)
    dim, hidden, words = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    shapes = {"model.embed_tokens.weight": (words, dim), "lm_head.weight": (words, dim), "model.norm.weight": (dim,)}
    for i in range(layers):
        start = f"model.layers.{i}."
        shapes |= {f"{start}self_attn.{name}_proj.weight": (dim, dim) for name in "qkvo"}
        shapes |= {f"{start}mlp.{name}_proj.weight": (hidden, dim) for name in ("gate", "up")}
        shapes[f"{start}mlp.down_proj.weight"] = (dim, hidden)
        shapes |= {f"{start}{name}_layernorm.weight": (dim,) for name in ("input", "post_attention")}
    configuration = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "head_dim": 64, **SIZES,
    }  # fmt: skip
    tensors = ((name, random.standard_normal(shape, dtype="float32")) for name, shape in shapes.items())
    write_checkpoint(directory, configuration, tensors)
    return (Path(directory) / "model.safetensors").stat().st_size


def load(library, directory):
    """Loads in this process; returns seconds and bytes above the imports."""
    if library == "keras_transformer":
        import keras_transformer.pretrained as pretrained

        pretrained.load  # noqa: B018 (imports what loading needs)

        def run():
            return pretrained.load(directory)
    else:
        import keras_nlp

        def run():
            return keras_nlp.models.LlamaBackbone.from_preset(directory)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    model = run()
    seconds = time.perf_counter() - start
    assert model.count_params() > 1e6
    return {"seconds": seconds, "bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="16 (default) make a file of about a gigabyte")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.library:
        print(json.dumps(load(arguments.library, arguments.directory)))
        return
    with tempfile.TemporaryDirectory() as directory:
        size = write(directory, arguments.layers)
        runs = {"keras_transformer": [], "keras_hub": []}
        for _ in range(arguments.rounds):
            for library, results in runs.items():
                command = [sys.executable, __file__, "--library", library, "--directory", directory]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
    table = {
        library: {
            "seconds": statistics.median(run["seconds"] for run in results),
            "peak_over_file": statistics.median(run["bytes"] for run in results) / size,
            "runs": results,
        }
        for library, results in runs.items()
    }
    table["file_bytes"] = size
    for library in runs:
        row = table[library]
        print(f"{library:18} {row['seconds']:6.2f} s, peak {row['peak_over_file']:.2f} times the file")
    ratio = table["keras_hub"]["seconds"] / table["keras_transformer"]["seconds"]
    print(f"{ratio:.2f} times as fast as KerasHub, a file of {size / 1e9:.2f} GB")
    if arguments.output:
        arguments.output.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
