"""Packing: each text once an epoch, none cut, few tokens of padding, and the same epochs for the same seed."""

import numpy as np
import pytest

from keras_transformer.pipelines.packing import exchanged, pack, packed_batches

LENGTHS = np.random.default_rng(0).integers(1, 12, (300, 2))
SOURCES = [[100 + i] * int(count) for i, (count, _) in enumerate(LENGTHS)]
TARGETS = [[100 + i] * int(count) for i, (_, count) in enumerate(LENGTHS)]


def texts_of(ids, segments):
    """The texts of a batch, in order."""
    for row, numbers in zip(ids.numpy(), segments.numpy(), strict=True):
        assert (np.diff(numbers[numbers > 0]) >= 0).all() and not row[numbers == 0].any()
        for number in range(1, numbers.max() + 1):
            yield row[numbers == number].tolist()


def pairs_of(batches):
    for inputs, labels in batches:
        sources = texts_of(inputs["source_ids"], inputs["source_segments"])
        targets = texts_of(inputs["target_ids"], inputs["target_segments"])
        said = texts_of(labels, inputs["target_segments"])
        yield from zip(sources, targets, said, strict=True)


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_pair_comes_once_an_epoch_and_whole(shuffle):
    batches = packed_batches(SOURCES, TARGETS, 32, 8, shuffle)
    expected = sorted(
        ([*source, 2], [1, *target], [*target, 2]) for source, target in zip(SOURCES, TARGETS, strict=True)
    )
    epochs = [list(pairs_of(batches)) for _ in range(2)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert (epochs[0] != epochs[1]) is shuffle
    assert len(list(batches)) == int(batches.cardinality())
    resumed = list(pairs_of(packed_batches(SOURCES, TARGETS, 32, 8, shuffle, first_epoch=1)))
    assert resumed == epochs[1]


def test_rows_are_nearly_full():
    tokens = [batch["token_segments"].numpy() for batch, _ in packed_batches(None, TARGETS, 64, 4)]
    assert {batch.shape for batch in tokens} == {(4, 64)}
    assert np.mean(np.concatenate(tokens)[:-4] > 0) > 0.95  # Of the last rows some are padding.


def test_no_row_holds_more_than_it_has_room_for():
    sizes = LENGTHS + 1
    rows = pack(sizes, 20, open_rows=3)
    assert sorted(np.concatenate(rows)) == list(range(len(sizes)))
    assert max(sizes[row].sum(axis=0).max() for row in rows) == 20


def test_only_texts_of_the_same_sizes_change_places():
    places = exchanged(LENGTHS, np.random.default_rng(1))
    assert sorted(places) == list(range(len(LENGTHS))) and (places != np.arange(len(LENGTHS))).any()
    np.testing.assert_array_equal(LENGTHS[places], LENGTHS)


BAD_INPUT = {
    "sides": (([[3]], [[3], [4]], 9, 2), "one sequence for each pair, and at least one; received 1 and 2"),
    "nothing": ((None, [], 9, 2), "at least one; received 0 and 0"),
    "too long": ((None, [[3], [4, 5, 6]], 3, 2), r"`length` must be at least 4, .*\(number 1\).*received length=3"),
    "no rows": ((None, [[3]], 9, 0), "`batch_size` must be a positive number of rows; received batch_size=0"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        packed_batches(*arguments)
