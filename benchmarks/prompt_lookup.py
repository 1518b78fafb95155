"""What prompt lookup gains where a text repeats its prompt or itself, and what it costs where it does not.

    python benchmarks/prompt_lookup.py
    python benchmarks/prompt_lookup.py --int8 --lookups 8,3

How many of the proposed tokens agree is up to the text, and what a step costs is up to the model. Both are measured as
they are: the model has the size of the other benchmarks and random weights, and writes real texts, because a
constraint forces each of their tokens. These are places in files after a commit, whose prompt is the same place before
it; Python code that goes on; and English text that goes on. Greedy decoding and each lookup, given as tokens proposed
and size of the n-gram, write each text in turn, again and again; the tokens are compared.
"""

import argparse
import json
import pydoc_data.topics
import subprocess
import sysconfig
import time
from pathlib import Path

import keras
import numpy as np
from keras import ops

import keras_transformer as kt
from keras_transformer.generation import Generator, Greedy

PROMPT, NEW, VOCABULARY = 256, 128, 8000


class Forced:
    """In the place of constraints: allows what the source has in the place of each new token, and nothing else."""

    no_repeat_source_ngram_size = 0

    def apply(self, scores, history, end_id):
        wanted = ops.take(history.source, ops.reshape(ops.minimum(history.count, NEW - 1), (1,)), axis=1)
        return ops.where(ops.arange(scores.shape[-1], dtype="int32") == wanted, 1e9, scores)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--lookups", nargs="+", default=["4,3", "8,3"], help="tokens proposed and size of the n-gram (default: 4,3 8,3)"
    )
    add("--texts", type=int, default=4, help="of each kind (default: 4)")
    add("--repeat", type=int, default=2, help="times that each is written (default: 2)")
    add("--int8", action="store_true", help="quantize the model")
    add("--repository", type=Path, default=Path(__file__).parent, help="whose commits are edits (default: this one)")
    add("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    texts = read_texts(arguments)
    model = build_model()
    if arguments.int8:
        model.quantize("int8")
    samplers = [Greedy(), *(Greedy(*map(int, lookup.split(","))) for lookup in arguments.lookups)]
    generators = [Generator(model, sampler=sampler, constraints=Forced()) for sampler in samplers]
    found = {}
    for kind, pairs in texts.items():
        found[kind] = ways = measure(generators, pairs, arguments.repeat)
        for (name, seconds), sampler in zip(ways.items(), samplers, strict=True):
            ratios = ways["0,3"] / seconds
            steps = [step_count(*pair, sampler.prompt_lookup, sampler.ngram_size) for pair in pairs]
            print(
                f"{kind:14}{name:6}{NEW / np.median(seconds):6.0f} tokens/s, {NEW / np.mean(steps):.2f} tokens a step, "
                f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}) of greedy's speed",
                flush=True,
            )
    if arguments.output:
        seconds = {kind: {name: x.tolist() for name, x in ways.items()} for kind, ways in found.items()}
        arguments.output.write_text(json.dumps(seconds, indent=2) + "\n")


def read_texts(arguments):
    """Pairs of a prompt and the text to write after it, as lists of tokens, by kind."""
    code = [path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    prose = list(pydoc_data.topics.topics.values())
    edited = edits(arguments.repository)
    tokenizer = kt.pipelines.train_byte_pairs([*code[::4], *prose[::2], *(old for old, _ in edited[::2])], VOCABULARY)

    def ids(text):
        return tokenizer.encode(text).ids

    pairs = {"edited": [(ids(old), ids(new)[:NEW]) for old, new in edited[1::2]]}
    for kind, texts in (("Python", code[1::2]), ("English", prose[1::2])):
        whole = [ids(text)[: PROMPT + NEW] for text in texts if len(text) > PROMPT + NEW]
        pairs[kind] = [(tokens[:PROMPT], tokens[PROMPT:]) for tokens in whole]
    random, kept = np.random.default_rng(0), {}
    for kind, found in pairs.items():
        fitting = [pair for pair in found if PROMPT // 2 < len(pair[0]) <= PROMPT and len(pair[1]) == NEW]
        kept[kind] = [fitting[i] for i in random.permutation(len(fitting))[: arguments.texts]]
    return kept


def edits(repository, commits=80):
    """Places in the files of a repository before and after a commit, with ten lines around."""
    command = ["git", "-C", repository, "log", "-p", "-U10", f"-n{commits}", "--no-merges", "--diff-filter=M"]
    log = subprocess.run([*command, "--format=", "--", "*.py"], capture_output=True, text=True, check=True).stdout
    found, inside = [], False
    for line in log.splitlines():
        if line.startswith(("@@", "diff")):
            inside = line.startswith("@@")
            found += [([], [])] if inside else []
        elif inside:
            old, new = found[-1]
            old += [line[1:]] if line[:1] in " -" else []
            new += [line[1:]] if line[:1] in " +" else []
    return [("\n".join(old), "\n".join(new)) for old, new in found]


def build_model():
    model = kt.models.causal_lm(VOCABULARY, 512, 6, 8)
    text = keras.Input((NEW,), dtype="int32", name="source_ids")
    # Changes nothing, but makes the text an input, which reaches the constraint.
    nothing = 0.0 * ops.cast(ops.sum(text), "float32")
    return keras.Model([*model.inputs, text], model.output + nothing)


def measure(generators, pairs, repeat):
    """Seconds of each text, the medians of several times, by sampler."""
    seconds = {}
    for turn in range(repeat + 1):
        for number, (prompt, text) in enumerate(pairs if turn else pairs[:1]):
            for generator in generators:
                started = time.perf_counter()
                tokens = generator.generate({"token_ids": [prompt], "source_ids": np.array([text])}, NEW)
                taken = time.perf_counter() - started
                assert tokens[0].tolist() == text
                name = "{prompt_lookup},{ngram_size}".format(**generator.sampler.get_config())
                if turn:  # Before the first one something may be compiled.
                    seconds.setdefault(name, {}).setdefault(number, []).append(taken)
    return {name: np.array([np.median(times) for times in rows.values()]) for name, rows in seconds.items()}


def step_count(prompt, text, count, size):
    """How many steps a lookup takes for a text, the prompt's among them."""
    tokens, steps, i = prompt + text, 1, len(prompt) + 1
    while i < len(tokens):
        last, steps, agreed = tokens[i - size : i], steps + 1, 0
        place = next((j for j in range(i - 1, size - 1, -1) if tokens[j - size : j] == last), None)
        if place is not None and i + count < len(tokens):
            while agreed < count and tokens[place + agreed % (i - place)] == tokens[i + agreed]:
                agreed += 1
        i += 1 + agreed
    return steps


if __name__ == "__main__":
    main()
