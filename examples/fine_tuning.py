"""Fine-tuning, end to end: from a checkpoint in the Hugging Face layout to one for a task of your own.

    python examples/fine_tuning.py
    python examples/fine_tuning.py --checkpoint bert-base-cased --data reviews.tsv --method lora --output reviews
    python examples/fine_tuning.py --checkpoint t5-small --data questions.tsv --prompt "question: {}"

The first line trains a small GPT-2 on French names of numbers, and then teaches it German ones with far fewer. An
encoder, such as BERT, learns to classify from a file with `label` and `text`. A decoder, alone or behind an encoder, as
GPT-2 or T5, learns to answer from lines with a text, a tab and the answer, such as a summary.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import keras_transformer as kt
from keras_transformer.pretrained.checkpoint import read_json
from keras_transformer.pretrained.families import gpt2
from keras_transformer.pretrained.family import find_family
from keras_transformer.training.adapters import NEW

SMALL = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 128, "n_layer": 2, "n_head": 4}
SMALL |= {"n_positions": 128, **dict.fromkeys(["resid_pdrop", "attn_pdrop", "embd_pdrop"], 0.0)}
SMALL |= dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"], 0)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="DIR", help="default: a small GPT-2, trained on the spot")
    add("--data", help="file of labels and texts, or of texts and answers; default: German names of numbers")
    add("--labels", nargs="+", metavar="NAME", help="of the classes; default: those in the data")
    add("--prompt", default="{}\n", help="what a decoder reads; {} stands for the text (default: the text, a new line)")
    add("--method", choices=["full", "lora"], default="full")
    add("--rank", type=int, default=8, help="of the adapters of --method lora (default: 8)")
    add("--train", nargs="+", metavar="LAYER", help="trained whole by --method lora (default: a new head; of the "
        "small GPT-2 its embedding, as its German words are new)")  # fmt: skip
    add("--learning-rate", type=float, help="default: 5e-5, with --method lora 3e-4; for the small GPT-2 3e-3")
    add("--batch-size", type=int, default=32)
    add("--epochs", type=int, default=5)
    add("--max-new-tokens", type=int, default=64, help="of an answer (default: 64)")
    add("--pairs", type=int, default=3000, help="of German names of numbers (default: 3000)")
    add("--base-steps", type=int, default=250, help="that the small GPT-2 is trained for (default: 250)")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("fine_tuning_output"), help="new, empty, or of a run to resume")
    arguments = parser.parse_args()
    counts = ("rank", "batch_size", "epochs", "max_new_tokens", "base_steps", "pairs")
    if min(getattr(arguments, name) for name in counts) < 1:
        parser.error("--rank, --batch-size, --epochs, --max-new-tokens, --base-steps, --pairs must be at least 1")
    if "{}" not in arguments.prompt:
        parser.error(f"--prompt must have {{}} where the text belongs; received {arguments.prompt!r}")
    if (arguments.checkpoint is None) != (arguments.data is None):
        parser.error("--checkpoint and --data belong together: what to tune, and what to tune it with")
    output = arguments.output
    if output.exists() and not (output / "backup").is_dir() and (not output.is_dir() or any(output.iterdir())):
        parser.error(f"--output must be a new or an empty directory, or hold a run that was interrupted; got {output}")
    usual = (3e-4 if arguments.method == "lora" else 5e-5) if arguments.checkpoint else 3e-3
    arguments.learning_rate = arguments.learning_rate or usual
    arguments.train = arguments.train or [*NEW, *([] if arguments.checkpoint else ["embedding"])]
    return parser, arguments


def read_data(arguments, classifies):
    """Pairs of a text and its label or answer to train on, and a tenth of them held out."""
    if classifies:
        pairs = list(zip(*kt.pipelines.read_labelled_texts(arguments.data, arguments.labels), strict=True))
    elif arguments.data:
        pairs = kt.pipelines.read_pairs(arguments.data)
    else:
        pairs = kt.pipelines.number_pairs(arguments.pairs, "de", seed=arguments.seed)
    for number, pair in enumerate(pairs, start=1):
        if not all(part.strip() for part in pair):
            raise ValueError(f"{arguments.data}, line {number}: text and answer must not be empty; received {pair}")
    return kt.pipelines.split_by_group(pairs, [text for text, _ in pairs], 0.1, arguments.seed)


def train_small(directory, others, arguments):
    """Writes the checkpoint of a small GPT-2 that knows French names of numbers, with tokens for others as well."""
    pairs = kt.pipelines.number_pairs(10000, "fr", seed=arguments.seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=500, **options)
    tokenizer.train_from_iterator([text for pair in pairs + others for text in pair], trainer)
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    configuration = {**SMALL, "vocab_size": tokenizer.get_vocab_size()}
    model = gpt2.build(kt.pretrained.Fields(configuration, "gpt2"), "causal_lm", set())
    model = keras.Model({x.name: x for x in model.inputs}, model.output)
    prompts, answers = zip(*((arguments.prompt.replace("{}", text), answer) for text, answer in pairs), strict=True)
    rows = kt.pipelines.answer_inputs(model, tokenizer, prompts, answers, end_id=0)
    data = kt.pipelines.text_batches(*rows, 64, seed=arguments.seed)
    compile_model(model, 3e-3, arguments.base_steps, classifies=False)
    print(f"A small GPT-2 learns French numbers in {arguments.base_steps} steps.")
    model.fit(data.repeat(), steps_per_epoch=arguments.base_steps, shuffle=False)
    kt.pretrained.save(model, directory, configuration)


def make_batches(pairs, model, tokenizer, source, labels, arguments, first_epoch=0):
    """What the model reads, and what it is to say: the number of a label, or an answer."""
    texts, truth = zip(*pairs, strict=True)
    if labels:
        pad_id = read_json(source, "config.json").get("pad_token_id") or 0
        inputs = kt.pipelines.PairReader(tokenizer, pad_id, "segment_ids" in model.input)(texts)
        lengths = inputs["padding_mask"].sum(axis=-1)
        rows = {name: [row[:n] for row, n in zip(part, lengths, strict=True)] for name, part in inputs.items()}
        targets = [labels.index(label) for label in truth]
    else:
        ids = kt.generation.Generator.from_pretrained(source, model)
        end, pad_id = ids.end_id[0] if isinstance(ids.end_id, list) else ids.end_id, ids.pad_id
        prompts = [arguments.prompt.replace("{}", text) for text in texts]
        rows, targets = kt.pipelines.answer_inputs(model, tokenizer, prompts, truth, end, ids.start_id)
    options = {"seed": arguments.seed, "pad_id": pad_id, "first_epoch": first_epoch}
    return kt.pipelines.text_batches(rows, targets, arguments.batch_size, **options)


def compile_model(model, rate, steps, classifies):
    warmup = max(1, steps // 10)
    schedule = {"decay_steps": max(1, steps - warmup), "warmup_target": rate, "warmup_steps": warmup}
    optimizer = keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.0, **schedule), global_clipnorm=1.0)
    loss, metric = kt.training.SmoothedCrossEntropy(0.0, pad_id=-100), kt.training.TokenAccuracy(-100)
    if classifies:
        loss, metric = keras.losses.SparseCategoricalCrossentropy(from_logits=True), "accuracy"
    model.compile(optimizer, loss, weighted_metrics=[metric])


def share_right(answers, pairs):
    return sum(answer.strip() == right.strip() for answer, (_, right) in zip(answers, pairs, strict=True)) / len(pairs)


def draw_loss(before, history, path):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, epochs = figure.subplots(), range(len(history["loss"]) + 1)
    axes.plot(epochs, [before, *history["val_loss"]], marker="o", label="held out (epoch 0: before)")
    axes.plot(epochs[1:], history["loss"], marker="o", label="training")
    axes.set(xlabel="epoch", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path)


def main():
    parser, arguments = parse_arguments()
    kt.training.keep_memory()
    output, source = arguments.output, arguments.checkpoint or arguments.output / "base"
    keras.utils.set_random_seed(arguments.seed)
    try:
        configuration = SMALL if arguments.checkpoint is None else read_json(source, "config.json")
        classifies = not {"causal_lm", "seq2seq"} & set(find_family(configuration).tasks.values())
        train, held_out = read_data(arguments, classifies)
        labels = (arguments.labels or sorted({label for _, label in train + held_out})) if classifies else None
        seen = vars(arguments) | {"output": None, "texts": train + held_out}
        resume = kt.training.Resume(output / "backup", 100, seen, delete_checkpoint=False)
        if arguments.checkpoint is None and not source.exists():
            resume.directory.mkdir(parents=True, exist_ok=True)
            partial = output / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            train_small(partial, train, arguments)
            partial.rename(source)
        keras.utils.set_random_seed(arguments.seed)
        options = {"task": "sequence_classification", "labels": labels} if classifies else {}
        model, tokenizer = kt.pretrained.load(source, **options), kt.pipelines.read_tokenizer(source)
        known = model, tokenizer, source, labels, arguments
        data, validation = make_batches(train, *known, resume.epoch), make_batches(held_out, *known)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if arguments.method == "lora":
        kt.training.add_adapters(model, arguments.rank, trained=arguments.train)
    compile_model(model, arguments.learning_rate, arguments.epochs * len(data), classifies)
    trained = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    print(f"{len(train)} texts to train on, {len(held_out)} held out; {trained} of {model.count_params()} parameters.")
    before, asked = model.evaluate(validation, return_dict=True), held_out[:200]
    prompts = [text if classifies else arguments.prompt.replace("{}", text) for text, _ in asked]
    if not classifies:
        pipeline = kt.pipelines.load_pretrained(source, arguments.max_new_tokens)
        before["exact_match"] = share_right(pipeline.predict(prompts), asked)
    resume.directory.mkdir(parents=True, exist_ok=True)
    board, started = keras.callbacks.TensorBoard(output / "logs", write_graph=False), time.time()
    fit = {"validation_data": validation, "epochs": arguments.epochs, "callbacks": [board, resume], "shuffle": False}
    model.fit(data, **fit)
    history, seconds = resume.history, time.time() - started
    after = {name.removeprefix("val_"): values[-1] for name, values in history.items() if name.startswith("val_")}
    if arguments.method == "lora":
        kt.training.save_adapters(model, output / "adapters.npz")
        model = kt.training.merge_adapters(model, kt.pretrained.load(source, **options))
    model.save(output / "model.keras")
    kt.pretrained.save(model, output / "checkpoint")
    written = {path.name for path in (output / "checkpoint").iterdir()}
    for path in source.iterdir():  # The files of the tokenizer.
        if path.suffix in (".json", ".txt", ".model") and ".index" not in path.name and path.name not in written:
            shutil.copy(path, output / "checkpoint")
    pipeline = kt.pipelines.load_pretrained(output / "checkpoint", arguments.max_new_tokens)
    after["exact_match"] = share_right(answers := pipeline.predict(prompts), asked)
    draw_loss(before["loss"], history, output / "loss.png")
    if keras.backend.backend() == "tensorflow":
        pipeline.export(output / "saved_model")
        answer = tf.saved_model.load(output / "saved_model").signatures["serving_default"]
        answers = [text.decode() for text in answer(text=tf.constant(prompts[:5]))["text"].numpy()]
        print(f"{output / 'saved_model'} answers:")
    for (text, right), answered in zip(asked[:5], answers, strict=False):
        print(f"  text    {text[:100]}\n  answer  {answered}\n  right   {right}\n")
    metrics = {"before": before, "after": after, "history": history, "train_seconds": seconds}
    metrics |= {"method": arguments.method, "trained_parameters": trained, "parameters": model.count_params()}
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    shutil.rmtree(resume.directory)
    print(json.dumps({"before": before, "after": after}, indent=2))


if __name__ == "__main__":
    main()
