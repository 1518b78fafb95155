"""Batches by tokens: nothing lost, nothing twice, within the budget, and the same for the same seed."""

import keras
import numpy as np
import pytest

from keras_transformer.pipelines import token_batches


def corpus(count=300, seed=0):
    """Sentences whose tokens tell which pair they belong to."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 40, size=(count, 2))
    return [[10 + i] * n for i, (n, _) in enumerate(lengths)], [[10 + i] * n for i, (_, n) in enumerate(lengths)]


def as_arrays(dataset):
    return [(x["source_ids"].numpy(), x["target_ids"].numpy(), labels.numpy()) for x, labels in dataset]


def pairs_of(batches):
    strip = lambda row: tuple(row[row != 0].tolist())  # noqa: E731
    return [(strip(s), strip(t), strip(y)) for batch in batches for s, t, y in zip(*batch, strict=True)]


CASES = {
    "shuffled": {"tokens_per_batch": 256},
    "in order": {"tokens_per_batch": 256, "shuffle": False},
    "any length": {"tokens_per_batch": 256, "length_multiple": 1},
    "wide steps": {"tokens_per_batch": 300, "length_multiple": 16},
    "one row each": {"tokens_per_batch": 40, "length_multiple": 1},
    "one batch": {"tokens_per_batch": 10**6},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_every_pair_once_each_epoch_within_the_budget(options):
    sources, targets = corpus()
    dataset = token_batches(sources, targets, **options)
    expected = sorted((*s, 2) for s in sources), sorted((1, *t) for t in targets), sorted((*t, 2) for t in targets)
    for _ in range(2):
        batches = as_arrays(dataset)
        assert len(batches) == int(dataset.cardinality())
        pairs = pairs_of(batches)
        assert tuple(sorted(side) for side in zip(*pairs, strict=True)) == expected
        # Source and target of one pair stay together: their tokens say where they come from.
        assert all(s[0] == t[1] for s, t, _ in pairs if len(s) > 1 and len(t) > 1)
        multiple = options.get("length_multiple", 4)
        for source, target, labels in batches:
            assert max(source.size, target.size) <= options["tokens_per_batch"]
            assert source.shape[1] % multiple == target.shape[1] % multiple == 0
            assert source.dtype == target.dtype == labels.dtype == "int32"


def test_labels_are_the_targets_one_step_ahead():
    sources, targets = corpus()
    for _, target, labels in as_arrays(token_batches(sources, targets, 256)):
        lengths = (labels != 0).sum(axis=-1)
        for row, label, length in zip(target, labels, lengths, strict=True):
            assert row[0] == 1 and label[length - 1] == 2
            assert (row[1:length] == label[: length - 1]).all()
            assert not row[length:].any() and not label[length:].any()


def test_budget_is_used():
    sources, targets = corpus(3000)
    batches = as_arrays(token_batches(sources, targets, 2048))
    full = [max(source.size, target.size) > 0.9 * 2048 for source, target, _ in batches]
    assert np.mean(full) > 0.9


def test_seed_decides_the_epochs():
    sources, targets = corpus()

    def epochs(**options):
        dataset = token_batches(sources, targets, 256, **options)
        return [pairs_of(as_arrays(dataset)) for _ in range(3)]

    first = epochs(seed=1)
    assert first == epochs(seed=1)
    assert first[0] != first[1] != first[2]
    assert first[0] != epochs(seed=2)[0]
    assert first[2] == epochs(seed=1, first_epoch=2)[0]
    ordered = epochs(shuffle=False)
    assert ordered[0] == ordered[1]
    widths = [max(len(s), len(y)) for s, _, y in ordered[0]]
    assert widths[0] <= 4 and widths[-1] > 36


def test_batches_mix_differently_in_each_epoch():
    sources, targets = [[10 + i] for i in range(60)], [[10 + i] for i in range(60)]
    dataset = token_batches(sources, targets, 40)
    first, second = ({frozenset(s[:, 0].tolist()) for s, _, _ in as_arrays(dataset)} for _ in range(2))
    assert first != second


@pytest.mark.parametrize("as_list", [list, np.array, tuple])
def test_kinds_of_sequences(as_list):
    dataset = token_batches([as_list([5, 6]), as_list([7])], [as_list([8]), as_list([9, 4])], 64, shuffle=False)
    ((source, target, labels),) = as_arrays(dataset)
    assert source.tolist() == [[5, 6, 2, 0], [7, 2, 0, 0]]
    assert target.tolist() == [[1, 8, 0, 0], [1, 9, 4, 0]]
    assert labels.tolist() == [[8, 2, 0, 0], [9, 4, 2, 0]]


def test_own_ids():
    dataset = token_batches([[5]], [[6]], 64, start_id=7, end_id=8, pad_id=9, length_multiple=3)
    ((source, target, labels),) = as_arrays(dataset)
    assert (source.tolist(), target.tolist(), labels.tolist()) == ([[5, 8, 9]], [[7, 6, 9]], [[6, 8, 9]])


@pytest.mark.parametrize(
    "sources, targets, message",
    [
        ([[1]], [[1], [2]], "received 1 and 2"),
        ([], [], "at least one pair"),
        ([[5], [5] * 70], [[5], [5]], r"`tokens_per_batch` must be at least 72, .*number 1\); received 64"),
    ],
)
def test_refuses(sources, targets, message):
    with pytest.raises(ValueError, match=message):
        token_batches(sources, targets, 64)


def test_training_traces_once_and_knows_its_steps():
    sources, targets = corpus(100)
    dataset = token_batches(sources, targets, 512)
    source_ids = keras.Input((None,), dtype="int32", name="source_ids")
    target_ids = keras.Input((None,), dtype="int32", name="target_ids")
    traces = []

    class Count(keras.layers.Layer):
        def call(self, x):
            traces.append(x.shape)
            return x

    embedding = keras.layers.Embedding(200, 4)
    context = keras.layers.GlobalAveragePooling1D(keepdims=True)(embedding(source_ids))
    logits = keras.layers.Dense(200)(Count()(embedding(target_ids)) + context)
    model = keras.Model([source_ids, target_ids], logits)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    if keras.backend.backend() == "tensorflow":
        before = len(traces)
        history = model.fit(dataset, epochs=2, verbose=0)
        assert len(traces) == before + 1
    else:
        history = model.fit(dataset, epochs=2, verbose=0)
    assert history.params["steps"] == int(dataset.cardinality())
    assert int(model.optimizer.iterations) == 2 * int(dataset.cardinality())
