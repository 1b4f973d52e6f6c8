"""Padding never changes an answer, for every pooling, direction, depth, normalisation, patch and crop."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from hpo.models.classifier import Classifier
from hpo.models.config import EARLIER_EPSILON, ClassifierConfig, ClassifierError
from hpo.models.fields import rules
from hpo.models.preprocessing import channel_statistics, crop_last, fold_patches, valid_values

POOLINGS = rules(ClassifierConfig)["pooling"].names
NORMALIZATIONS = rules(ClassifierConfig)["normalization"].names
LENGTHS = torch.tensor([9, 3, 1, 5])
VARIABLE = [name for name in POOLINGS if name != "flatten"]
STEMS: dict[str, dict[str, Any]] = {
    "none": {"stem": "none"},
    "patch": {"patch_length": 4},
    "conv": {"stem": "conv", "stem_width": 6, "stem_kernel": 4, "stem_stride": 4, "difference": True},
    "skip": {"patch_length": 2, "skip": True},
    "convs": {"stem": "conv", "stem_layers": 2, "stem_width": 6, "stem_kernel": 3, "stem_stride": 2, "skip": True},
    "mask": {"missing": "mask", "interval": 2.0, "patch_length": 2, "difference": True, "normalization": "sequence"},
}
TOLERANCE = 2e-6  # float32 sums of some ten terms, in another order where the batch has another shape


def network(**given: object) -> tuple[Classifier, torch.Tensor]:
    """A network in evaluation mode and values (4, 9, 2) with their marks, zero after each length."""
    torch.manual_seed(0)
    fields = {"features": 2, "classes": 2, "steps": 9, "hidden_size": 5, "dropout": 0.4} | given
    config = ClassifierConfig(**fields)  # type: ignore[arg-type]
    values = torch.randn(4, 9, config.given) * 3 + 1
    values[torch.arange(9)[None, :] >= LENGTHS[:, None]] = 0
    model = Classifier(config).eval()
    model.fit_normalization(values, LENGTHS)
    return model, values


@pytest.mark.parametrize("pooling", VARIABLE)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
class TestPaddingNeverChangesTheAnswer:
    @pytest.fixture(params=[*itertools.product(STEMS, (0, 4), (2, 3))], ids=str)
    def model(
        self, request: pytest.FixtureRequest, pooling: str, bidirectional: bool, layers: int
    ) -> tuple[Classifier, torch.Tensor]:
        stem, keep, classes = request.param
        return network(
            pooling=pooling,
            bidirectional=bidirectional,
            layers=layers,
            **STEMS[stem],
            sequence_length=keep,
            classes=classes,
            head_size=3,
        )

    def test_alone_or_in_a_batch(self, model: tuple[Classifier, torch.Tensor]) -> None:
        net, values = model
        together = net(values, LENGTHS)
        alone = [net(values[i : i + 1, :n], LENGTHS[i : i + 1])[0] for i, n in enumerate(LENGTHS.tolist())]
        torch.testing.assert_close(together, torch.stack(alone), atol=TOLERANCE, rtol=0)

    def test_longer_padding_with_whatever_values(self, model: tuple[Classifier, torch.Tensor]) -> None:
        net, values = model
        padded = nn.functional.pad(values, (0, 0, 0, 5))
        padded[torch.arange(14)[None, :] >= LENGTHS[:, None]] = 7.0
        torch.testing.assert_close(net(padded, LENGTHS), net(values, LENGTHS), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_normalization_ignores_padding(normalization: str) -> None:
    net, values = network(normalization=normalization)
    padded = nn.functional.pad(values, (0, 0, 0, 5), value=9.0)
    torch.testing.assert_close(net(padded, LENGTHS), net(values, LENGTHS), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("pooling", "bidirectional"), [*itertools.product(POOLINGS, [False, True])])
def test_full_length_path_equals_the_general_one(pooling: str, bidirectional: bool) -> None:
    net, values = network(pooling=pooling, bidirectional=bidirectional, layers=2)
    patches, lengths = net.prepare(values, torch.full((4,), 9))
    torch.testing.assert_close(net.logits(patches, None), net.logits(patches, lengths), atol=TOLERANCE, rtol=0)


def test_last_reads_the_last_valid_step_as_packed_sequences_do() -> None:
    """Held against torch's own variable-length path."""
    net, values = network(bidirectional=True, layers=2)
    packed = nn.utils.rnn.pack_padded_sequence(values, LENGTHS, batch_first=True, enforce_sorted=False)
    net.lstm.batch_first = True
    _, (hidden, _) = net.lstm(packed)
    expected = net.head(torch.cat([hidden[-2], hidden[-1]], 1)).squeeze(-1)
    net.lstm.batch_first = False
    torch.testing.assert_close(net(values, LENGTHS), expected, atol=TOLERANCE, rtol=0)


def test_a_partial_patch_is_zero_filled_and_counts() -> None:
    values = torch.arange(1.0, 6).reshape(1, 5, 1)
    patches, lengths = fold_patches(values, torch.tensor([5]), 2)
    assert patches.tolist() == [[[1, 2], [3, 4], [5, 0]]]
    assert lengths.tolist() == [3]


def test_crop_keeps_the_last_valid_steps() -> None:
    values = torch.arange(1.0, 6).reshape(1, 5, 1).repeat(2, 1, 1)
    cropped, lengths = crop_last(values, torch.tensor([4, 1]), 2)
    assert cropped[0, :, 0].tolist() == [3, 4]
    assert cropped[1, 0, 0] == 1
    assert lengths.tolist() == [2, 1]


def test_a_constant_channel_normalizes_to_zero() -> None:
    values = torch.full((3, 4, 1), 5.0)
    mean, deviation = channel_statistics(valid_values(values, torch.tensor([4, 2, 1])).double())
    assert (mean.item(), deviation.item()) == (5, 0)
    for name in ("channel", "sequence"):
        net = Classifier(ClassifierConfig(features=1, classes=2, steps=4, normalization=name))
        net.fit_normalization(values, torch.tensor([4, 2, 1]))
        patches, _ = net.prepare(values, torch.tensor([4, 2, 1]))
        assert patches.abs().max() == 0


class TestScaleDoesNotDecide:
    """Signals of 1e-12 (tesla, ampere) and of 1e30 are learnt as any other. 1e-5 added to a deviation hid small ones.

    scikit-learn#19726 (M/EEG), pytorch#53465 (float32's range).
    """

    @staticmethod
    def prepared(normalization: str, values: torch.Tensor, **given: float) -> torch.Tensor:
        config = ClassifierConfig(features=2, classes=2, steps=9, normalization=normalization, **given)  # type: ignore[arg-type]
        net = Classifier(config)
        net.fit_normalization(values, LENGTHS)
        return net.prepare(values, LENGTHS)[0]

    @pytest.mark.parametrize("normalization", ["channel", "sequence"])
    @pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-9, 1e-6, 1e6, 1e30])
    def test_any_unit_gives_the_same_inputs(self, normalization: str, scale: float) -> None:
        _, values = network()
        expected = self.prepared(normalization, values)
        assert 0.5 < expected.std() < 1.5
        torch.testing.assert_close(self.prepared(normalization, values * scale), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("normalization", ["channel", "sequence"])
    def test_an_offset_gives_the_same_inputs_up_to_what_float32_keeps(self, normalization: str) -> None:
        _, values = network()
        expected = self.prepared(normalization, values)
        torch.testing.assert_close(self.prepared(normalization, values + 1e4), expected, atol=5e-3, rtol=0)

    @pytest.mark.parametrize("normalization", ["channel", "sequence"])
    @pytest.mark.parametrize("value", [1e-12, 0.1, 1.7e9])
    def test_a_feature_that_varies_by_rounding_alone_becomes_zero(self, normalization: str, value: float) -> None:
        _, values = network()
        values[:, :, 1] = value
        values[0, 0, 1] = torch.nextafter(values[0, 0, 1], torch.tensor(torch.inf))
        prepared = self.prepared(normalization, values)
        assert (prepared[:, :, 1] == 0).all()
        assert prepared[:, :, 0].abs().max() > 0.5

    def test_a_feature_that_was_constant_in_training_says_nothing_later(self) -> None:
        net = Classifier(ClassifierConfig(features=1, classes=2, steps=4, normalization="channel"))
        net.fit_normalization(torch.full((3, 4, 1), 5.0), torch.tensor([4, 2, 1]))
        assert (net.prepare(torch.full((3, 4, 1), 7.0), torch.tensor([4, 2, 1]))[0] == 0).all()

    @pytest.mark.parametrize("normalization", ["channel", "sequence"])
    def test_what_earlier_versions_trained_keeps_its_bits(self, normalization: str) -> None:
        _, values = network()
        values = values[:, :1] * 1e-4  # one step to each, so that no other order of a sum is possible
        ones = torch.ones(4, dtype=torch.int64)
        config = ClassifierConfig(features=2, classes=2, steps=1, normalization=normalization, epsilon=EARLIER_EPSILON)
        net = Classifier(config)
        net.fit_normalization(values, ones)
        mean, deviation = channel_statistics(valid_values(values, ones).double())
        expected = (values - mean) / (deviation + 1e-5) if normalization == "channel" else torch.zeros(4, 1, 2)
        assert torch.equal(net.prepare(values, ones)[0], expected.transpose(0, 1))


def test_weights_load_into_a_plain_lstm() -> None:
    net, values = network(layers=2, bidirectional=True)
    plain = nn.LSTM(2, 5, 2, bidirectional=True)
    plain.load_state_dict({name[5:]: value for name, value in net.state_dict().items() if name.startswith("lstm.")})
    torch.testing.assert_close(plain(values.transpose(0, 1))[0], net.lstm(values.transpose(0, 1))[0])


def test_binary_probabilities_sum_to_one() -> None:
    net, values = network()
    probabilities = net.probabilities(values, LENGTHS)
    assert probabilities.shape == (4, 2)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"classes": 1}, "classes must be at least 2, got 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"pooling": "sum"}, "pooling must be one of last, mean, max, attention, concat, flatten, got 'sum'"),
    ],
)
def test_a_configuration_out_of_range_names_rule_and_value(given: dict[str, object], message: str) -> None:
    with pytest.raises(ClassifierError, match=message):
        network(**given)
