"""Mixing and noise: shares and labels, what stays zero, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpo.models.config import TrainingConfig
from hpo.models.preprocessing import valid
from hpo.models.training.augmentation import Noise, augmented, deviation_of, mixing_shares
from tests.unit.test_training import run, sequences, training

BATCHES = [np.arange(5), np.arange(3)]
LENGTHS = torch.tensor([4, 2, 6])


def shares(epoch: int, mixup: float = 0.3) -> list[list[float]]:
    found = mixing_shares(BATCHES, TrainingConfig("accuracy", mixup=mixup, seed=7), 0, epoch)
    assert found is not None
    return [one.tolist() for one in found]


def test_shares_are_a_function_of_the_epoch_and_no_less_than_half() -> None:
    assert shares(2) == shares(2) != shares(3)
    assert [len(one) for one in shares(2)] == [5, 3]
    assert all(0.5 <= share <= 1 for one in shares(2) for share in one)
    assert mixing_shares(BATCHES, TrainingConfig("accuracy"), 0, 1) is None


def test_a_sequence_is_mixed_with_the_next_one_within_its_own_length() -> None:
    values = torch.ones(6, 3, 2) * torch.tensor([1.0, 10.0, 100.0])[None, :, None] * valid(LENGTHS, 6)[:, :, None]
    share = torch.tensor([0.75, 0.5, 1.0])
    found = augmented(values, LENGTHS, share, None, torch.Generator())
    assert found[:, :, 0].T.tolist() == [[3.25, 3.25, 0.75, 0.75, 0, 0], [55, 55, 0, 0, 0, 0], [100] * 6]


def test_noise_has_the_deviation_that_is_asked_for_and_leaves_padding_alone() -> None:
    values = torch.ones(6, 3000, 2) * torch.tensor([5.0, 0.0])
    lengths = torch.arange(3000) % 6 + 1
    values = values * valid(lengths, 6)[:, :, None]
    found = augmented(values, lengths, None, Noise(torch.tensor([0.2, 0.0]), 0.1), torch.Generator().manual_seed(0))
    inside = valid(lengths, 6)
    assert not found[~inside].any()
    assert not found[:, :, 1].any()  # a channel that is always zero stays so
    first = found[:, :, 0][inside]
    assert float(first.mean()) == pytest.approx(5, abs=0.03)
    assert float(first.std()) == pytest.approx((0.2**2 + (5 * 0.1) ** 2) ** 0.5, abs=0.02)


def test_channels_in_another_order_get_the_same_noise() -> None:
    torch.manual_seed(0)
    values, order = torch.randn(6, 3, 4), torch.tensor([2, 0, 3, 1])
    own = Noise(torch.tensor([0.1, 0.2, 0.3, 0.4]), 0.1)
    found = augmented(values, LENGTHS, None, own, torch.Generator().manual_seed(0))
    turned = Noise(own.added[order], 0.1, places=order)
    again = augmented(values[:, :, order], LENGTHS, None, turned, torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, found[:, :, order])


def test_the_deviation_is_that_of_the_training_rows_within_their_lengths() -> None:
    torch.manual_seed(0)
    values, rows = torch.randn(6, 3, 2), np.array([0, 2])
    part = torch.cat([values[:4, 0], values[:6, 2]])
    torch.testing.assert_close(deviation_of(values, LENGTHS, rows), part.std(0, correction=0))


def test_the_loss_of_a_mixture_is_that_of_both_labels_by_their_shares() -> None:
    for classes in (2, 3):
        member = training(sequences(classes), mixup=0.3).members[0]
        batch = member.train.batch(np.arange(4), np.full(4, 0.75, np.float32))
        torch.manual_seed(0)
        logits = torch.randn(4) if classes == 2 else torch.randn(4, classes)
        own, next_one = batch.labels, batch.labels.roll(-1)
        if classes == 2:
            expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, 0.75 * own + 0.25 * next_one)
        else:
            targets = 0.75 * torch.eye(classes)[own] + 0.25 * torch.eye(classes)[next_one]
            expected = torch.nn.functional.cross_entropy(logits, targets)
        torch.testing.assert_close(member.learner._loss(logits, batch, None), expected)


@pytest.mark.parametrize("classes", [2, 3])
def test_smoothing_spreads_a_share_of_the_label_over_all_classes(classes: int) -> None:
    member = training(sequences(classes), label_smoothing=0.3).members[0]
    batch = member.train.batch(np.arange(4))
    torch.manual_seed(0)
    logits = torch.randn(4) if classes == 2 else torch.randn(4, classes)
    targets = 0.7 * torch.eye(classes)[batch.labels] + 0.3 / classes
    both = torch.stack([torch.zeros(4), logits], 1) if classes == 2 else logits
    expected = torch.nn.functional.cross_entropy(both, targets)
    torch.testing.assert_close(member.learner._loss(logits, batch, None), expected)


def test_validation_is_of_the_sequences_as_they_are() -> None:
    subject = run(training(sequences(), mixup=0.4, jitter=0.5), 2)
    again = training(sequences())
    again.load(subject.weights())
    np.testing.assert_array_equal(again.validate(), subject.validate())
