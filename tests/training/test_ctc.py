"""The loss of unaligned sequences, held against torch's."""

import keras
import numpy as np
import pytest
from harness import as_numpy, gradients, random
from keras import ops

from keras_transformer.ops.masks import set_mask
from keras_transformer.training import CTCLoss

LABELS = np.array([[1, 2, 3, 0, 0], [4, 4, 0, 0, 0], [3, 1, 1, 2, 4]], "int32")
LENGTHS = np.array([9, 4, 7])


def reference(labels, logits, lengths, blank=0):
    """The sum of torch's losses, over the number of labels."""
    import torch

    counts = torch.tensor((labels != blank).sum(axis=-1))
    log_probabilities = torch.log_softmax(torch.tensor(logits), dim=-1).transpose(0, 1)
    loss = torch.nn.functional.ctc_loss(
        log_probabilities, torch.tensor(labels), torch.tensor(lengths), counts, blank=blank, reduction="sum"
    )
    return float(loss / counts.sum())


def padded(logits, lengths=LENGTHS):
    """Logits as `speech_recognizer` pads them."""
    real = (np.arange(logits.shape[1]) < lengths[:, None])[..., None]
    return np.where(real, logits, np.where(np.arange(logits.shape[2]) == 0, 0, -1e4)).astype("float32")


@pytest.mark.parametrize("blank", [0, 5])
def test_it_is_torchs_loss_a_label(blank):
    logits, labels = random(3, 9, 6, scale=2), np.where(LABELS == 0, blank, LABELS)
    loss = float(CTCLoss(blank)(labels, logits))
    assert loss == pytest.approx(reference(labels, logits, [9, 9, 9], blank), rel=1e-5)


def test_padding_of_frames_does_not_count():
    logits = random(3, 9, 6, scale=2)
    expected = reference(LABELS, logits, LENGTHS)
    assert float(CTCLoss()(LABELS, padded(logits))) == pytest.approx(expected, rel=1e-5)
    masked = set_mask(ops.convert_to_tensor(logits), ops.convert_to_tensor(np.arange(9) < LENGTHS[:, None]))
    assert float(CTCLoss()(LABELS, masked)) == pytest.approx(expected, rel=1e-5)
    assert float(CTCLoss()(LABELS, padded(logits.astype("float16")))) == pytest.approx(expected, rel=1e-2)


def test_what_cannot_be_aligned_is_left_out():
    """Too short by one frame, which two equal labels need between them, and no label at all."""
    logits, lengths = random(3, 9, 6, scale=2), np.array([9, 2, 5])
    labels = LABELS.copy()
    expected = reference(labels[:1], logits[:1], [9])
    assert float(CTCLoss()(labels, padded(logits, lengths))) == pytest.approx(expected, rel=1e-5)
    labels[0] = 0
    variable = keras.Variable(padded(logits, lengths))
    assert float(CTCLoss()(labels, variable.value)) == 0
    assert not gradients(lambda: CTCLoss()(labels, variable.value), [variable])[0].any()


def test_weights_and_gradient():
    logits = random(3, 9, 6, scale=2)
    weighted = float(CTCLoss()(LABELS, padded(logits), np.array([0.0, 1.0, 0.0])))
    assert weighted == pytest.approx(reference(LABELS[1:2], logits[1:2], [4]), rel=1e-5)
    variable = keras.Variable(padded(logits))
    found = gradients(lambda: CTCLoss()(LABELS, variable.value), [variable])[0]
    changed = logits.copy()
    changed[2, 3, 1] += 1e-2
    slope = (reference(LABELS, changed, LENGTHS) - reference(LABELS, logits, LENGTHS)) / 1e-2
    assert found[2, 3, 1] == pytest.approx(slope, rel=2e-2)
    assert not found[1, 4:].any() and np.isfinite(found).all()


def test_a_file_holds_it_and_shapes_are_checked():
    loss = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(CTCLoss(3)))
    assert isinstance(loss, CTCLoss) and loss.get_config() == {"blank_id": 3, "name": "ctc_loss"}
    with pytest.raises(ValueError, match=r"\(batch, frames, vocabulary\) .* received y_pred of shape \(2, 3\)"):
        loss(np.zeros((2, 3), "int32"), as_numpy(random(2, 3)))
