"""What quantizing costs a translator in quality: logits, BLEU and file size of `examples/translation.py` in each mode.

    python examples/translation.py
    python benchmarks/quantization.py --run translation_output

The 1,000 held-out number names are scored, and GPTQ is calibrated with names that the model was trained on. The modes
with `projections` leave the embedding as it is, which is also the output projection of this model.
"""

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
import sacrebleu

import keras_transformer as kt

MODES = ["float32", "int8", "int4", "int8 projections", "int4 projections", "gptq"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("translation_output"), help="what the example has written")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    return parser.parse_args()


def held_out(run):
    arguments = json.loads((run / "arguments.json").read_text())
    if arguments["data"] != ["numbers"]:
        sys.exit("--run must be a run of the example on number names")
    pairs = kt.pipelines.number_pairs(arguments["pairs"] + 1000, arguments["target_language"], seed=arguments["seed"])
    return kt.pipelines.hold_out(pairs, 1000, seed=arguments["seed"])


def inputs_of(pipeline, pairs):
    ids = [kt.pipelines.token_ids(pipeline.source, side) for side in zip(*pairs, strict=True)]
    inputs = next(iter(kt.pipelines.token_batches(*ids, 2048, shuffle=False)))[0]
    return {name: x.numpy() for name, x in inputs.items()}


def quantize(model, mode, rows):
    if mode == "gptq":
        model.quantize("gptq", config=kt.training.gptq_config(model, rows))
    elif mode.endswith("projections"):
        model.quantize(mode.split()[0], filters=lambda layer: isinstance(layer, keras.layers.Dense))
    elif mode != "float32":
        model.quantize(mode)


def main():
    arguments = parse_arguments()
    train, validation = held_out(arguments.run)
    sources, references = map(list, zip(*validation, strict=True))
    wanted = None
    for mode in arguments.modes:
        pipeline = kt.pipelines.load(arguments.run / "pipeline")
        model, inputs = pipeline.generator.model, inputs_of(pipeline, validation[:100])
        real = inputs["target_ids"] != 0
        wanted = keras.ops.convert_to_numpy(model(inputs))[real] if wanted is None else wanted
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of layers that have no kernel.
            quantize(model, mode, inputs_of(pipeline, train[:200]))
        found = keras.ops.convert_to_numpy(model(inputs))[real]
        with tempfile.TemporaryDirectory() as directory:
            pipeline.save(Path(directory, "pipeline"))
            size = Path(directory, "pipeline", "model.keras").stat().st_size
            reloaded = kt.pipelines.load(Path(directory, "pipeline"))
        translations = reloaded.predict(sources)
        result = {
            "mode": mode,
            "cosine": round(float(np.sum(found * wanted) / np.linalg.norm(found) / np.linalg.norm(wanted)), 5),
            "bleu": round(sacrebleu.corpus_bleu(translations, [references], force=True).score, 2),
            "exact_match": float(np.mean([a == b for a, b in zip(translations, references, strict=True)])),
            "megabytes": round(size / 1e6, 2),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
