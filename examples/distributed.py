"""The translation run on several devices, in several processes or on several machines.

    python examples/distributed.py --engine jax
    python examples/distributed.py --engine torch --processes 2
    python examples/distributed.py --engine tf --hosts first:12355 second:12355 --rank 0   # on the second one: --rank 1

The first line uses all devices of this machine (torch: one), the second one starts two processes here, and the third
one is for each machine of a list. Every process reads its own rows of the batches that one process would train on, so
that the losses are the same, however many there are. The same command goes on from the last backup.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

BACKENDS = {"jax": "jax", "tf": "tensorflow", "torch": "torch"}
RANKS = "RANK", "SLURM_PROCID", "JOB_COMPLETION_INDEX"  # Set by torchrun, SLURM and an indexed job of Kubernetes.
PATIENCE = 60  # Seconds that the others have to end by themselves when a process has failed.


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--engine", choices=BACKENDS, default="jax", help="default: jax")
    add("--processes", type=int, default=1, help="start so many on this machine, each with a GPU of its own if it has")
    add("--hosts", nargs="+", metavar="HOST[:PORT]", help="where each process runs, in the order of their ranks")
    add("--rank", type=int, help=f"which of --hosts this process is (default: the first that is set of {RANKS})")
    add("--model-parallel", type=int, default=1, help="how many devices share one copy of the weights (jax)")
    add("--data", nargs="+", default=["numbers"], metavar="FILE", help="numbers (default), PAIRS.tsv, zip, two files")
    add("--validation", nargs="+", metavar="FILE", help="one or two files like --data; default: a held-out part")
    add("--pairs", type=int, help="how many to train on (default: 25000 number names, or all of the files)")
    add("--config", choices=["numbers", "tiny", "small", "base"], help="default: 'numbers' for names, 'tiny' for files")
    add("--tokenizer", choices=["sentencepiece", "wordpiece", "subwords"], default="sentencepiece")
    add("--epochs", type=int, help="default: as many as the updates of --config take")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("distributed_output"), help="directory that every process can read")
    parser.set_defaults(target_language="fr", vocabulary_size=None)
    arguments = parser.parse_args()
    numbers = arguments.data == ["numbers"]
    arguments.config = arguments.config or ("numbers" if numbers else "tiny")
    if arguments.pairs is None and numbers:
        arguments.pairs = 25000
    if arguments.model_parallel != 1 and arguments.engine != "jax":
        parser.error(f"--model-parallel needs --engine jax; received --engine {arguments.engine}")
    if arguments.processes > 1 and arguments.hosts:
        parser.error("--processes starts processes here and --hosts names those that are started elsewhere: give one")
    counts = [
        n for n in (arguments.processes, arguments.model_parallel, arguments.pairs, arguments.epochs) if n is not None
    ]
    if min(counts) < 1:
        parser.error("numbers of something must be at least 1")
    arguments.rank = find_rank(parser, arguments)
    return parser, arguments


def find_rank(parser, arguments):
    if not arguments.hosts or len(arguments.hosts) == 1:
        return 0
    given = [arguments.rank, *(int(os.environ[name]) for name in RANKS if name in os.environ)]
    rank = next((rank for rank in given if rank is not None), None)
    if rank is None or not 0 <= rank < len(arguments.hosts):
        parser.error(
            f"--rank must be 0 to {len(arguments.hosts) - 1}, the place of this process in --hosts; got {rank}"
        )
    return rank


def addresses(hosts):
    """Each host with a port: 12355 if none is given, and the following ones for more processes on the same host."""
    return [host if ":" in host else f"{host}:{12355 + hosts[:rank].count(host)}" for rank, host in enumerate(hosts)]


def start_processes(count):
    """Runs this command in `count` processes here, and returns a status: what fails in one of them ends them all."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    hosts = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    command = [sys.executable, *sys.argv, "--processes", "1", "--hosts", *hosts]
    processes = []
    try:
        for rank in range(count):
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus[rank] if rank < len(gpus) else "-1"}
            processes.append(subprocess.Popen([*command, "--rank", str(rank)], env=environment))
        while not any(process.poll() for process in processes):
            if all(process.poll() == 0 for process in processes):
                return 0
            time.sleep(0.2)
        failed = next(process for process in processes if process.poll())
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and any(process.poll() is None for process in processes):
            time.sleep(0.2)
        print(f"Process {processes.index(failed)} has failed, status {failed.returncode}.", file=sys.stderr)
        return 1
    finally:
        for process in processes:
            process.kill()


def train(engine, model, tokenizer, training_pairs, validation_pairs, arguments):
    """Trains, from the last backup if there is one, on the batches of `examples/translation.py`."""
    import keras
    from translation import RECIPES

    import keras_transformer as kt

    recipe, output = RECIPES[arguments.config], arguments.output
    seen = {"pairs": training_pairs, "validation": validation_pairs, "vocabulary": tokenizer.vocabulary_size()}
    resume = kt.training.Resume(output / "backup", 100, seen, delete_checkpoint=False)

    def batches(pairs, **options):
        ids = [kt.pipelines.token_ids(tokenizer, side) for side in zip(*pairs, strict=True)]
        return kt.pipelines.token_batches(*ids, recipe.tokens, seed=arguments.seed, **options)

    training, validation = batches(training_pairs, first_epoch=resume.epoch), batches(validation_pairs, shuffle=False)
    epochs = arguments.epochs or -(-recipe.updates // int(training.cardinality()))
    copies = engine.copy(model)
    callbacks = [resume]  # In every process; the first one writes.
    if engine.rank == 0:
        print(f"From epoch {resume.epoch}, batch {resume.batch} on.")
        log = keras.callbacks.CSVLogger(output / "log.csv", append=True)
        callbacks = [log, keras.callbacks.TensorBoard(output / "logs", write_graph=False), resume]
    with engine.scope():
        options = {"epochs": epochs, "callbacks": callbacks, "shuffle": False, "verbose": 0 if engine.rank else "auto"}
        copies.fit(engine.rows(training), validation_data=engine.rows(validation), **options)
    engine.take_back(copies, model)
    engine.stop()


def deliver(pipeline, validation, arguments):
    """Translates what was held out, and writes the figures, the model and the pipeline."""
    import sacrebleu
    from translation import export, show, to_score

    output, model = arguments.output, pipeline.generator.model
    pairs, tokenize = to_score(arguments, validation)
    sources, references = map(list, zip(*pairs, strict=True))
    translations = pipeline.predict(sources)
    show(translations[:5], pairs, "\nAfter training:")
    model.save(output / "model.keras")
    pipeline.save(output / "pipeline")
    if arguments.engine == "tf":
        export(pipeline, pairs[:5], output / "saved_model")
    metrics = {
        "exact_match": sum(a == b for a, b in zip(translations, references, strict=True)) / len(references),
        "bleu": sacrebleu.corpus_bleu(translations, [references], tokenize=tokenize, force=True).score,
        "parameters": model.count_params(),
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    shutil.rmtree(output / "backup", ignore_errors=True)
    print(json.dumps(metrics, indent=2))


def main():
    parser, arguments = parse_arguments()
    if arguments.processes > 1:
        sys.exit(start_processes(arguments.processes))
    os.environ["KERAS_BACKEND"] = BACKENDS[arguments.engine]
    import keras
    from translation import RECIPES, build_model, check_output, read_data, train_tokenizer

    import keras_transformer as kt

    kt.training.keep_memory()
    output, here = arguments.output, ("output", "processes", "hosts", "rank", "model_parallel")
    record = {name: value for name, value in vars(arguments).items() if name not in here}
    try:
        if arguments.rank == 0:
            check_output(output, record)
        engine = kt.distribution.start(
            addresses(arguments.hosts or ["127.0.0.1"]), arguments.rank, arguments.model_parallel
        )
        training, validation = read_data(arguments)
        training = training[: arguments.pairs]
        tokenizer = train_tokenizer(arguments, training)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if engine.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        (output / "arguments.json").write_text(json.dumps(record, indent=2) + "\n")
    keras.utils.set_random_seed(arguments.seed)
    recipe = RECIPES[arguments.config]
    model = build_model(recipe, tokenizer.vocabulary_size())
    try:
        train(engine, model, tokenizer, training, validation, arguments)
    except Exception:  # An engine that says farewell to the others may wait for one that never answers.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    if engine.rank == 0:
        generator = kt.generation.Generator(model, 1, 2, sampler=kt.generation.BeamSearch(recipe.beam))
        deliver(kt.pipelines.Pipeline(generator, tokenizer, tokenizer), validation, arguments)


if __name__ == "__main__":
    main()
