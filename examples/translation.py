"""Translation, end to end: from pairs of sentences to a SavedModel that turns strings into strings.

    python examples/translation.py
    python examples/translation.py --data deu-eng.zip --config small --output german
    python examples/translation.py --data train.en train.de --validation valid.en valid.de --tokenizer subwords

The first line learns the French names of numbers, so that every answer can be checked. The tokenizer `subwords` is for
text that is split already, as "spiel@@ haus". The same command once more resumes a run that was interrupted.
"""

import argparse
import csv
import json
import re
import shutil
import time
from collections import namedtuple
from pathlib import Path

import keras
import sacrebleu
import tensorflow as tf
from matplotlib.figure import Figure

import keras_transformer as kt

# `tiny` is the recipe of Wu et al. (2021) for Multi30k, `base` the model of "Attention Is All You Need".
Recipe = namedtuple("Recipe", "dim depth num_heads hidden_dim dropout peak warmup tokens updates vocabulary last beam")
RECIPES = {
    "numbers": Recipe(128, 2, 4, 256, 0.1, 2e-3, 400, 4096, 800, 400, 3, 1),
    "tiny": Recipe(128, 4, 4, 256, 0.3, 5e-3, 2000, 8192, 8000, 10000, 10, 5),
    "small": Recipe(256, 4, 4, 1024, 0.2, 1e-3, 4000, 8192, 30000, 8000, 5, 5),
    "base": Recipe(512, 6, 8, 2048, 0.1, 7e-4, 4000, 25000, 100000, 16000, 5, 4),
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", default=["numbers"], metavar="FILE", help="numbers (default), PAIRS.tsv, zip, two files")
    add("--validation", nargs="+", metavar="FILE", help="one or two files like --data; default: a held-out part")
    add("--target-language", default="fr", help="language of the number names, as num2words calls it (default: fr)")
    add("--pairs", type=int, default=25000, help="how many number names to train on (default: 25000)")
    add("--config", choices=RECIPES, help="default: 'numbers' for number names, 'tiny' for files")
    add("--tokenizer", choices=["sentencepiece", "wordpiece", "subwords"], default="sentencepiece")
    add("--vocabulary-size", type=int, help="default: by --config; for subwords, all there are")
    add("--epochs", type=int, help="default: as many as the updates of --config take")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("translation_output"), help="directory (default: translation_output)")
    arguments = parser.parse_args()
    counts = [n for n in (arguments.pairs, arguments.epochs, arguments.vocabulary_size) if n is not None]
    if min(counts) < 1 or len(arguments.data) > 2 or len(arguments.validation or ()) > 2:
        parser.error("--data and --validation take one or two files; numbers of something must be at least 1")
    arguments.config = arguments.config or ("numbers" if arguments.data == ["numbers"] else "tiny")
    return parser, arguments


def check_output(output, record):
    """Refuses a directory that holds anything but an unfinished run of the same arguments, which can go on."""
    path = output / "arguments.json"
    earlier = json.loads(path.read_text()) if path.is_file() else "other things"
    interrupted = earlier == record and not (output / "metrics.json").exists()
    if output.exists() and any(output.iterdir()) and not interrupted:
        raise ValueError(f"--output must be new or an interrupted run of the same arguments; {output} holds {earlier}")


def read_data(arguments):
    """Returns the pairs to train on and the pairs to validate on."""
    if arguments.data == ["numbers"]:
        pairs = kt.pipelines.number_pairs(arguments.pairs + 1000, arguments.target_language, seed=arguments.seed)
    else:
        pairs = kt.pipelines.read_pairs(*arguments.data)
    if arguments.validation:
        return pairs, kt.pipelines.read_pairs(*arguments.validation)
    held_out = 1000 if arguments.data == ["numbers"] else max(1, min(1000, len(pairs) // 20))
    return kt.pipelines.hold_out(pairs, held_out, seed=arguments.seed)


def train_tokenizer(arguments, pairs):
    texts = [text for pair in pairs for text in pair]
    if arguments.tokenizer == "subwords":
        return kt.pipelines.train_subwords(texts, arguments.vocabulary_size)
    kind = {"sentencepiece": kt.pipelines.train_sentence_piece, "wordpiece": kt.pipelines.train_word_piece}
    return kind[arguments.tokenizer](texts, arguments.vocabulary_size or RECIPES[arguments.config].vocabulary)


def build_model(recipe, size):
    model = kt.models.transformer(size, size, *recipe[:4], dropout=recipe.dropout, shared_embedding=True)
    rate = kt.training.InverseSquareRoot(recipe.dim, recipe.warmup, peak=recipe.peak, initial=1e-7)
    optimizer = keras.optimizers.Adam(rate, beta_1=0.9, beta_2=0.98, epsilon=1e-9, global_clipnorm=25.0)
    model.compile(optimizer, kt.training.SmoothedCrossEntropy(0.1), metrics=[kt.training.TokenAccuracy()])
    model.optimizer.build(model.trainable_variables)
    return model


def train_model(pipeline, train, validation, scored, tokenize, arguments):
    """Trains, from the last backup if there is one, and leaves the average of the last epochs in the model."""
    recipe, output, model = RECIPES[arguments.config], arguments.output, pipeline.generator.model
    stopping = keras.callbacks.EarlyStopping("val_bleu", mode="max", patience=10)
    seen = {"pairs": train, "validation": validation, "vocabulary": pipeline.source.vocabulary_size()}
    resume = kt.training.Resume(output / "backup", 100, seen, replay=[stopping], delete_checkpoint=False)
    if resume.epoch or resume.batch:
        print(f"Going on after epoch {resume.epoch}, batch {resume.batch}.")

    def batches(pairs, **options):
        ids = [kt.pipelines.token_ids(pipeline.source, side) for side in zip(*pairs, strict=True)]
        return kt.pipelines.token_batches(*ids, recipe.tokens, seed=arguments.seed, **options)

    train, validation = batches(train, first_epoch=resume.epoch), batches(validation, shuffle=False)
    started, epochs = time.time(), arguments.epochs or -(-recipe.updates // int(train.cardinality()))

    def finish_epoch(epoch, logs):
        nonlocal started
        if epoch % 5 == 0 or epoch + 1 == epochs:
            show(pipeline.predict([source for source, _ in scored[:3]]), scored, f"\nAfter epoch {epoch + 1}:")
        logs["seconds"], started = time.time() - started, time.time()

    callbacks = [
        kt.training.BleuScore(pipeline.predict, *zip(*scored, strict=True), tokenize=tokenize),
        keras.callbacks.LambdaCallback(on_epoch_end=finish_epoch),
        kt.training.AverageWeights(output / "epochs", last=recipe.last),
        keras.callbacks.CSVLogger(output / "log.csv", append=True),
        keras.callbacks.TensorBoard(output / "logs", write_graph=False),
        stopping,
        resume,
    ]
    model.fit(train, validation_data=validation, callbacks=callbacks, shuffle=False, epochs=epochs)
    rows = csv.DictReader((output / "log.csv").read_text().splitlines())
    rows = [{name: float(value) for name, value in row.items()} for row in rows]
    return list({row["epoch"]: row for row in rows}.values())  # An epoch that was ended twice has two.


def to_score(arguments, pairs):
    """Pairs with the references that translations are held to, and what sacrebleu calls the way to cut them."""
    if arguments.tokenizer != "subwords":
        return pairs, "13a"
    # Text that came split is scored as words: the pipeline joins what it writes, so the references are joined as well.
    return [(source, re.sub("@@( |$)", "", reference)) for source, reference in pairs], "none"


def show(translations, pairs, title):
    print(title)
    for translation, (source, reference) in zip(translations, pairs, strict=False):
        print(f"  source       {source}\n  translation  {translation}\n  reference    {reference}\n")


def export(pipeline, pairs, path):
    pipeline.export(path)
    translate = tf.saved_model.load(path).signatures["serving_default"]
    texts = translate(text=tf.constant([source for source, _ in pairs]))["text"].numpy()
    show([text.decode() for text in texts], pairs, f"\n{path} translates:")


def draw_curves(log, path):
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, names in zip(figure.subplots(1, 2), (["loss", "val_loss"], ["val_bleu"]), strict=True):
        axes.plot([row["epoch"] + 1 for row in log], [[row[name] for name in names] for row in log], label=names)
        axes.set_xlabel("epoch")
        axes.legend()
    figure.savefig(path)


def main():
    parser, arguments = parse_arguments()
    kt.training.keep_memory()
    recipe, output = RECIPES[arguments.config], arguments.output
    record = {name: value for name, value in vars(arguments).items() if name != "output"}
    try:
        check_output(output, record)
        train, validation = read_data(arguments)
        tokenizer = train_tokenizer(arguments, train)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    output.mkdir(parents=True, exist_ok=True)
    (output / "arguments.json").write_text(json.dumps(record, indent=2) + "\n")
    keras.utils.set_random_seed(arguments.seed)
    model = build_model(recipe, tokenizer.vocabulary_size())
    generator = kt.generation.Generator(model, 1, 2, sampler=kt.generation.BeamSearch(recipe.beam))
    pipeline = kt.pipelines.Pipeline(generator, tokenizer, tokenizer)
    print(f"{len(train)} pairs to train on, {len(validation)} to validate on, {model.count_params()} parameters.")
    answers, tokenize = to_score(arguments, validation)
    scored = answers[:200] if arguments.data == ["numbers"] else answers
    try:
        log = train_model(pipeline, train, validation, scored, tokenize, arguments)
    except KeyboardInterrupt:
        parser.exit(130, f"\nInterrupted. The same command goes on from the last backup in {output}.\n")
    sources, references = map(list, zip(*answers, strict=True))
    translations = pipeline.predict(sources)
    metrics = {
        "exact_match": sum(a == b for a, b in zip(translations, references, strict=True)) / len(references),
        "bleu": sacrebleu.corpus_bleu(translations, [references], tokenize=tokenize, force=True).score,
        "parameters": model.count_params(),
        "train_seconds": sum(row["seconds"] for row in log),
        "epochs": len(log),
    }
    draw_curves(log, output / "curves.png")
    model.save(output / "model.keras")
    pipeline.save(output / "pipeline")
    if keras.backend.backend() == "tensorflow":
        export(pipeline, answers[:5], output / "saved_model")
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    for name in ("epochs", "backup"):
        shutil.rmtree(output / name, ignore_errors=True)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
