"""One trial's training: exact resume, what each epoch counts, what ends it."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpo.models.classifier import Classifier
from hpo.models.config import ClassifierConfig, TrainingConfig, TrainingError
from hpo.models.data.sequences import Sequences, from_arrays
from hpo.models.data.splits import split_folds, split_share
from hpo.models.fields import rules
from hpo.models.kernel import native
from hpo.models.kernel.native import Kernel
from hpo.models.metrics import score
from hpo.models.training.batches import Batch, Batches
from hpo.models.training.memory import memory_bytes
from hpo.models.training.origin import origin_of
from hpo.models.training.schedules import learning_rate
from hpo.models.training.training import Diverged, Training, TrainingInterrupted
from tests.unit.test_mask import gapped

CONVOLUTIONS: dict[str, Any] = {
    "stem": "conv", "stem_layers": 2, "stem_width": 5, "stem_kernel": 3, "stem_stride": 2, "difference": True,
    "skip": True,
}  # fmt: skip
MASKED: dict[str, Any] = {"missing": "mask", "interval": 1.5, "normalization": "channel"}
AUGMENTED: dict[str, Any] = {"mixup": 0.3, "jitter": 0.1, "label_smoothing": 0.1, "normalization": "channel"}
OPTIMIZERS = rules(TrainingConfig)["optimizer"].names


def sequences(classes: int = 2, variable: bool = True, n: int = 48) -> Sequences:
    """Noisy sines whose frequency is the class; some values were filled, and steps are at unequal distances."""
    random = np.random.default_rng(0)
    labels = np.arange(n) % classes
    lengths = random.integers(6, 15, n) if variable else np.full(n, 14)
    parts = [
        np.sin(np.arange(length) * (1 + label))[:, None] + random.normal(0, 0.3, (length, 2))
        for length, label in zip(lengths, labels, strict=True)
    ]
    return gapped(from_arrays(parts, labels))


def training(data: Sequences, folds: int = 0, fixed_shapes: bool = False, **given: Any) -> Training:
    torch.set_num_threads(1)
    shape = {name: given.pop(name) for name in list(given) if name in ClassifierConfig.__dataclass_fields__}
    config = ClassifierConfig(
        features=data.n_features, classes=len(data.classes), steps=data.steps, **({"hidden_size": 6} | shape)
    )
    parts = split_folds(data, folds, 0) if folds else split_share(data, 0.25, 0)
    settings: dict[str, Any] = {"metric": "accuracy", "epochs": 6, "batch_size": 8, "learning_rate": 0.02, "seed": 3}
    kernel = given.pop("kernel", None)
    return Training(data, parts, config, TrainingConfig(**(settings | given)), kernel=kernel, fixed_shapes=fixed_shapes)


class TestOrigin:
    def test_says_host_device_kernel_and_torch(self, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("socket.gethostname", lambda: "host-a")
        data, about = sequences(), f"torch {torch.__version__}"
        assert run(training(data), 1).history[0].origin == f"host-a: cpu, torch LSTM, {about}"
        assert run(training(data, kernel=kernel), 1).history[0].origin == f"host-a: cpu, {kernel.name}, {about}"
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
        assert origin_of(torch.device("cuda:1"), "torch") == f"host-a: NVIDIA L4, {about}"

    def test_stays_with_the_epochs_of_a_checkpoint_which_hardly_grows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = sequences()
        first = run(training(data, epochs=40), 40)
        with_origins = len(first.state())
        monkeypatch.setattr("socket.gethostname", lambda: "host-b" * 8)
        resumed = training(data, epochs=60)
        resumed.restore(first.state())
        run(resumed, 20)
        origins = [epoch.origin for epoch in resumed.history]
        assert origins == [first.origin] * 40 + [resumed.origin] * 20
        monkeypatch.setattr(first, "history", [replace(epoch, origin="") for epoch in first.history])
        assert with_origins - len(first.state()) < 200

    def test_is_unknown_of_an_earlier_versions_epochs(self) -> None:
        data = sequences()
        content = torch.load(io.BytesIO(run(training(data), 2).state()), weights_only=True)
        for epoch in content["history"]:
            del epoch["origin"]
        buffer = io.BytesIO()
        torch.save(content, buffer)
        resumed = training(data)
        resumed.restore(buffer.getvalue())
        run(resumed, 1)
        assert [epoch.origin for epoch in resumed.history] == ["", "", resumed.origin]


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    found = native.load(tmp_path_factory.mktemp("native"))
    if found is None:
        pytest.skip("no C compiler here")
    return found


def run(subject: Training, epochs: int) -> Training:
    for _ in range(epochs):
        subject.advance()
    return subject


def training_batches(batches: Batches, batch_size: int, *seed: object) -> Iterator[Batch]:
    """The batches of an epoch, as a member cuts them."""
    return (batches.batch(part) for part in batches.epoch(batch_size, *seed))


def assert_same(one: Training, other: Training) -> None:
    """Bit for bit: history without times, weights, best weights."""
    strip = [[vars(epoch) | {"seconds": 0} for epoch in subject.history] for subject in (one, other)]
    assert strip[0] == strip[1]
    for a, b in zip(one.members, other.members, strict=True):
        assert all(
            torch.equal(x, y) for x, y in zip(a.learner.weights().values(), b.learner.weights().values(), strict=True)
        )
    for left, right in zip(one.best_weights, other.best_weights, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["constant", "cosine", "plateau"])
@pytest.mark.parametrize("folds", [0, 3])
def test_a_resumed_training_ends_in_the_same_bits(optimizer: str, schedule: str, folds: int) -> None:
    given: dict[str, Any] = {
        "optimizer": optimizer,
        "schedule": schedule,
        "layers": 2,
        "dropout": 0.3,
        "weight_decay": 1e-3,
    }
    data = sequences()
    whole = run(training(data, folds, **given), 6)
    checkpoint = run(training(data, folds, **given), 3).state()
    resumed = training(data, folds, **given)
    resumed.restore(checkpoint)
    assert_same(run(resumed, 3), whole)


def test_a_resumed_bfloat16_training_ends_in_the_same_bits() -> None:
    data = sequences()
    whole = run(training(data, precision="bfloat16"), 4)
    resumed = training(data, precision="bfloat16")
    resumed.restore(run(training(data, precision="bfloat16"), 2).state())
    assert_same(run(resumed, 2), whole)


@pytest.mark.parametrize(
    "shape", [{}, {"bidirectional": True}, {"layers": 2, "dropout": 0.5}, {"stem": "conv", "stem_width": 4}]
)
def test_where_the_cpu_has_no_lstm_in_bfloat16_it_runs_in_float32(
    shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN has none without AVX-512: every training ended with an error of its own there."""
    found = []
    lstm = torch.lstm

    def noted(patches: torch.Tensor, *given: Any) -> Any:
        found.append((patches.dtype, torch.is_autocast_enabled("cpu")))
        return lstm(patches, *given)

    monkeypatch.setattr("hpo.models.classifier.has_bfloat16_lstm", lambda: False)
    monkeypatch.setattr(torch, "lstm", noted)
    subject = training(sequences(), precision="bfloat16", **shape)
    for member in subject.members:
        member.learner.model.apart = False  # layer by layer, through torch.lstm, so that it is seen
    run(subject, 2)
    assert set(found) == {(torch.float32, False)}
    single = run(training(sequences(), **shape), 2)
    assert subject.history[-1].train_loss == pytest.approx(single.history[-1].train_loss, rel=0.05)
    assert subject.history[-1].train_loss != single.history[-1].train_loss  # the rest is in bfloat16


def test_what_runs_beside_does_not_change_a_training() -> None:
    """Nothing random is kept between epochs: two trainings may take turns in one process."""
    data = sequences()
    alone = run(training(data, layers=2, dropout=0.5), 3)
    one, other = training(data, layers=2, dropout=0.5), training(data, layers=2, dropout=0.5, seed=9)
    for _ in range(3):
        one.advance()
        other.advance()
    assert_same(one, alone)


def test_the_value_is_the_pooled_metric_of_the_best_weights() -> None:
    data = sequences(classes=3)
    subject = run(training(data, folds=4), 6)
    assert subject.best is not None
    subject.load(subject.best_weights)
    probabilities = subject.validate()
    assert score("accuracy", probabilities, subject.labels) == subject.best.value
    assert score("log_loss", probabilities, subject.labels) == subject.best.log_loss
    assert sorted(subject.labels) == sorted(data.labels if data.labels is not None else [])


@pytest.mark.parametrize("metric", ["accuracy", "auroc", "macro_f1"])
def test_of_values_that_no_validation_sequence_tells_apart_the_lowest_log_loss_is_best(metric: str) -> None:
    subject = run(training(sequences(), folds=3, metric=metric, epochs=12), 12)
    assert subject.best is not None
    top = max(epoch.value for epoch in subject.history)
    rivals = [epoch for epoch in subject.history if epoch.value >= top - 0.5 / 48]
    assert subject.best in rivals
    later = [epoch.log_loss for epoch in rivals if epoch.number >= subject.best.number]
    assert subject.best.log_loss == min(later)


def test_log_loss_as_the_metric_is_minimized() -> None:
    subject = run(training(sequences(), metric="log_loss"), 5)
    assert subject.best is not None
    assert subject.best.value == min(epoch.value for epoch in subject.history)


def test_a_network_learns_what_can_be_learnt() -> None:
    data = sequences(classes=3, n=120)
    subject = run(training(data, epochs=25, hidden_size=16, pooling="mean"), 25)
    assert subject.best is not None
    assert subject.best.value >= 0.9


def test_it_finishes_after_its_epochs_or_its_patience() -> None:
    subject = training(sequences(), epochs=3, patience=None)
    while not subject.finished:
        subject.advance()
    assert len(subject.history) == 3
    subject = training(sequences(), epochs=500, patience=2, learning_rate=1e-9)
    while not subject.finished:
        subject.advance()
    assert subject.best is not None
    assert subject.history[-1].number == subject.best.number + 2


def test_a_loss_that_is_no_number_is_reported_as_divergence() -> None:
    with pytest.raises(Diverged, match=r"epoch \d"):
        run(training(sequences(), learning_rate=1e38, optimizer="sgd", gradient_clip=0.0), 6)


def test_it_stops_between_two_batches_when_interrupted() -> None:
    subject = training(sequences())
    with pytest.raises(TrainingInterrupted):
        subject.advance(lambda: subject.batches == 2)
    assert subject.batches == 2
    assert subject.history == []


def test_the_chosen_threshold_goes_with_the_value() -> None:
    subject = run(training(sequences(), threshold="chosen", metric="f1", epochs=1), 1)
    epoch = subject.history[0]
    assert score("f1", subject.validate(), subject.labels, epoch.threshold) == epoch.value
    assert epoch.value >= score("f1", subject.validate(), subject.labels, 0.5)


def test_balanced_class_weights_lift_the_rare_class() -> None:
    random = np.random.default_rng(1)
    labels = (np.arange(200) % 10 == 0).astype(int)
    data = from_arrays(random.normal(labels[:, None, None], 1.5, (200, 5, 1)), labels)
    recall = {}
    for weight in ("none", "balanced"):
        subject = run(training(data, class_weight=weight, epochs=8), 8)
        recall[weight] = score("balanced_accuracy", subject.validate(), subject.labels)
    assert recall["balanced"] > recall["none"]


class TestTheFastPathAgainstTheSimpleOne:
    """Steps of ours against what anybody would write: torch's own module, losses, optimisers and schedules.

    Tolerance 2e-5 on weights of size 1 after 6 epochs of 5 steps: float32 sums in another order differ by some 1e-7
    a step, and an adaptive optimiser passes a relative error on as an absolute one of up to the learning rate (0.02).
    """

    TOLERANCE = 2e-5

    @pytest.mark.parametrize("native", [False, True])
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("schedule", ["constant", "cosine", "plateau"])
    def test_epochs_equal_those_of_a_plain_loop(
        self, native: bool, optimizer: str, schedule: str, kernel: Kernel
    ) -> None:
        data = sequences(classes=3 if schedule == "cosine" else 2)
        given: dict[str, Any] = {"optimizer": optimizer, "schedule": schedule, "weight_decay": 1e-2}
        given |= {"kernel": kernel} if native else {}
        subject = training(data, **given)
        plain = Plain(subject)
        for number in range(1, 7):
            epoch = subject.advance()
            assert plain.epoch(number, epoch.log_loss) == pytest.approx(epoch.train_loss, abs=1e-5)
        for name, weight in plain.model.state_dict().items():
            torch.testing.assert_close(subject.members[0].learner.weights()[name], weight, atol=self.TOLERANCE, rtol=0)

    @pytest.mark.parametrize("variable", [False, True])
    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize(("classes", "class_weight"), [(2, "none"), (2, "balanced"), (3, "balanced")])
    @pytest.mark.parametrize("more", [{}, CONVOLUTIONS, {"mixup": 0.3}, MASKED])
    def test_steps_of_fixed_shape_equal_cropped_ones(
        self, variable: bool, bidirectional: bool, classes: int, class_weight: str, more: dict[str, Any]
    ) -> None:
        data = sequences(classes, variable, n=45)  # 33 or 34 in training: batches of 6 and 7, so rows are filled up
        given: dict[str, Any] = {"class_weight": class_weight, "bidirectional": bidirectional, "layers": 2, **more}
        cropped, fixed = (run(training(data, 0, shapes, **given), 4) for shapes in (False, True))
        assert fixed.batches == cropped.batches
        for one, other in zip(cropped.history, fixed.history, strict=True):
            assert other.train_loss == pytest.approx(one.train_loss, abs=1e-5)
            assert other.log_loss == pytest.approx(one.log_loss, abs=1e-5)
        for name, weight in cropped.members[0].learner.weights().items():
            torch.testing.assert_close(fixed.members[0].learner.weights()[name], weight, atol=self.TOLERANCE, rtol=0)

    @pytest.mark.parametrize("variable", [False, True])
    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("layers", [1, 2])
    def test_the_native_kernel_equals_torch(
        self, variable: bool, bidirectional: bool, layers: int, kernel: Kernel
    ) -> None:
        """Without dropout, whose random numbers are its own: see test_native_network.py."""
        data = sequences(variable=variable)
        given: dict[str, Any] = {"bidirectional": bidirectional, "layers": layers, "pooling": "mean"}
        own, torchs = (run(training(data, kernel=k, **given), 4) for k in (kernel, None))
        assert own.lstm_kernel.startswith("native-")
        for one, other in zip(own.history, torchs.history, strict=True):
            assert one.train_loss == pytest.approx(other.train_loss, abs=1e-5)
            assert one.log_loss == pytest.approx(other.log_loss, abs=1e-5)
        for name, weight in torchs.members[0].learner.weights().items():
            torch.testing.assert_close(own.members[0].learner.weights()[name], weight, atol=self.TOLERANCE, rtol=0)

    def test_a_resumed_training_on_the_native_kernel_ends_in_the_same_bits(self, kernel: Kernel) -> None:
        data = sequences()
        given: dict[str, Any] = {"layers": 2, "dropout": 0.3, "bidirectional": True, "kernel": kernel}
        whole = run(training(data, **given), 4)
        resumed = training(data, **given)
        resumed.restore(run(training(data, **given), 2).state())
        assert_same(run(resumed, 2), whole)

    @pytest.mark.parametrize("pooling", ["last", "concat"])
    def test_the_native_kernel_runs_beneath_a_stem(self, pooling: str, kernel: Kernel) -> None:
        given: dict[str, Any] = {**CONVOLUTIONS, "bidirectional": True, "pooling": pooling}
        own, torchs = (run(training(sequences(), kernel=k, **given), 4) for k in (kernel, None))
        assert own.lstm_kernel.startswith("native-")
        for name, weight in torchs.members[0].learner.weights().items():
            torch.testing.assert_close(own.members[0].learner.weights()[name], weight, atol=self.TOLERANCE, rtol=0)

    @pytest.mark.parametrize("fixed_shapes", [False, True])
    @pytest.mark.parametrize(
        "given", [CONVOLUTIONS, AUGMENTED, CONVOLUTIONS | AUGMENTED, MASKED, CONVOLUTIONS | AUGMENTED | MASKED]
    )
    def test_with_stem_and_augmentation_a_resumed_training_ends_in_the_same_bits(
        self, given: dict[str, Any], fixed_shapes: bool, kernel: Kernel
    ) -> None:
        def begin() -> Training:
            return training(sequences(), 3, fixed_shapes, kernel=kernel, **given)

        whole, resumed = run(begin(), 4), begin()
        resumed.restore(run(begin(), 2).state())
        assert_same(run(resumed, 2), whole)

    def test_bfloat16_runs_on_torch(self, kernel: Kernel) -> None:
        assert training(sequences(), precision="bfloat16", kernel=kernel).lstm_kernel == "torch"

    def test_a_training_goes_on_under_the_other_kind_of_steps(self) -> None:
        data = sequences()
        whole = run(training(data), 4)
        resumed = training(data, fixed_shapes=True)
        resumed.restore(run(training(data), 2).state())
        run(resumed, 2)
        for name, weight in whole.members[0].learner.weights().items():
            torch.testing.assert_close(resumed.members[0].learner.weights()[name], weight, atol=self.TOLERANCE, rtol=0)

    def test_a_resumed_training_of_fixed_shapes_ends_in_the_same_bits(self) -> None:
        data = sequences()
        given: dict[str, Any] = {"layers": 2, "dropout": 0.3, "head_size": 4}
        whole = run(training(data, 3, True, **given), 4)
        resumed = training(data, 3, True, **given)
        resumed.restore(run(training(data, 3, True, **given), 2).state())
        assert_same(run(resumed, 2), whole)

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_gradients_of_a_cropped_batch_equal_padded_and_one_by_one(self, bidirectional: bool) -> None:
        """In float64 the three differ by rounding alone, so 1e-12 shows that they are the same function."""
        data = sequences()
        member = training(data, layers=2, bidirectional=bidirectional, pooling="mean").members[0]
        model, batches = member.learner.model.double(), member.train
        part = np.arange(8)
        batch = batches.batch(part)
        padded = batches.values.index_select(1, torch.from_numpy(batches.rows[part])).double()
        lengths, labels = batches.lengths[torch.from_numpy(batches.rows[part])], batch.labels.double()

        def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
            return list(torch.autograd.grad(loss, list(model.parameters())))

        alone = [model.logits(padded[:n, i : i + 1], None)[0] for i, n in enumerate(lengths.tolist())]
        ways = [model.logits(batch.values.double(), batch.lengths), model.logits(padded, lengths), torch.stack(alone)]
        one, two, three = (gradients(logits) for logits in ways)
        for a, b, c in zip(one, two, three, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
            torch.testing.assert_close(a, c, atol=1e-12, rtol=0)


class Plain:
    """The loop that anybody would write, on the first weights and the batches of a training."""

    def __init__(self, subject: Training) -> None:
        self.member, self.config = subject.members[0], subject.config
        self.model = Classifier(self.member.learner.model.config)
        self.model.load_state_dict(self.member.learner.weights())
        kinds: dict[str, Any] = {
            "adamw": torch.optim.AdamW,
            "adam": torch.optim.Adam,
            "rmsprop": torch.optim.RMSprop,
            "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
        }
        rate, decay = self.config.learning_rate, self.config.weight_decay
        self.optimizer = kinds[self.config.optimizer](self.model.parameters(), lr=rate, weight_decay=decay)
        schedulers: Any = torch.optim.lr_scheduler
        self.schedule: Any = {
            "constant": lambda: schedulers.ConstantLR(self.optimizer, 1.0),
            "cosine": lambda: schedulers.CosineAnnealingLR(self.optimizer, self.config.epochs),
            "plateau": lambda: schedulers.ReduceLROnPlateau(self.optimizer, factor=0.5, patience=3),
        }[self.config.schedule]()
        self.loss = torch.nn.BCEWithLogitsLoss() if self.model.config.classes == 2 else torch.nn.CrossEntropyLoss()

    def epoch(self, number: int, log_loss: float) -> float:
        total = 0.0
        for batch in training_batches(self.member.train, self.config.batch_size, self.config.seed, 0, number):
            self.optimizer.zero_grad()
            logits = self.model.logits(batch.values, batch.lengths)
            labels = batch.labels.float() if self.model.config.classes == 2 else batch.labels
            loss = self.loss(logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
            self.optimizer.step()
            total += loss.item() * len(labels)
        self.schedule.step(*[log_loss] * (self.config.schedule == "plateau"))
        return total / len(self.member.train)


def test_the_rate_falls_as_torchs_schedules_let_it() -> None:
    losses = [1.0, 0.9, 0.95, 0.9, 0.91, 0.92, 0.93, 0.89999, 0.95, 0.95, 0.95, 0.95, 0.95, 0.5, 0.6]
    for kind in ("cosine", "plateau"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        schedule: Any = (
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            if kind == "cosine"
            else torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3)
        )
        config = TrainingConfig("accuracy", epochs=20, learning_rate=0.1, schedule=kind)
        optimizer.step()
        for count, loss in enumerate(losses):
            assert learning_rate(config, losses[:count]) == pytest.approx(optimizer.param_groups[0]["lr"])
            schedule.step(*[loss] * (kind == "plateau"))


def test_trainings_in_threads_of_one_process_give_the_bits_that_they_give_alone() -> None:
    """What slots rely on: results depend neither on how many trainings share a process nor on which."""
    data = sequences()
    kinds: list[dict[str, Any]] = [
        {"layers": 2, "dropout": 0.5, "seed": seed, "hidden_size": 4 + seed} for seed in range(4)
    ]
    alone = [run(training(data, 2, **given), 4) for given in kinds]
    together: dict[int, Training] = {}

    def slot(index: int) -> None:
        together[index] = run(training(data, 2, **kinds[index]), 4)

    threads = [threading.Thread(target=slot, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, subject in enumerate(alone):
        assert_same(together[index], subject)


TOO_LARGE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from hpo.models.device import OutOfMemory
from tests.unit.test_training import sequences, training
data = sequences()
small = training(data)
resource.setrlimit(resource.RLIMIT_AS, (2**31 + 2**30, 2**31 + 2**30))
try:
    training(data, hidden_size=20_000, batch_size=8).advance()
except OutOfMemory as error:
    print(error)
print(small.advance().number)
"""


def test_memory_that_runs_out_is_told_with_the_sizes_and_leaves_others_alone() -> None:
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", TOO_LARGE, root], capture_output=True, text=True, cwd=root, check=True)
    message, epoch = done.stdout.splitlines()
    assert "out of memory on cpu: hidden_size 20000, layers 1, batch_size 8, up to 14 steps of 2 values" in message
    assert "allow smaller sizes in [space]" in message
    assert epoch == "1"


def test_the_estimate_of_memory_grows_with_every_size() -> None:
    base = {"features": 2, "classes": 2, "steps": 100, "hidden_size": 16}

    def estimate(members: int = 1, batch: int = 32, **given: Any) -> int:
        return memory_bytes(1000, 200, members, ClassifierConfig(**(base | given)), batch, "cuda")

    least = estimate()
    assert all(estimate(**more) > least for more in ({"hidden_size": 32}, {"layers": 2}, {"bidirectional": True}))
    assert estimate(members=5) > least
    assert estimate(batch=512) > least


class TestBatches:
    def batches(self, variable: bool) -> tuple[Batches, Sequences]:
        data = sequences(variable=variable, n=50)
        model = Classifier(ClassifierConfig(features=2, classes=2, steps=data.steps))
        patches, lengths = model.prepare(torch.from_numpy(data.values), torch.from_numpy(data.lengths))
        return Batches(patches, lengths, torch.arange(50)), data

    @pytest.mark.parametrize("variable", [False, True])
    def test_every_sequence_comes_once(self, variable: bool) -> None:
        batches, _ = self.batches(variable)
        for parts in (list(training_batches(batches, 16, 0, 1)), list(batches.evaluation(16))):
            assert sorted(np.concatenate([part.indices for part in parts])) == list(range(50))
            assert all(torch.equal(part.labels, torch.from_numpy(part.indices)) for part in parts)

    def test_batches_are_cropped_to_their_longest_and_of_like_length(self) -> None:
        batches, data = self.batches(variable=True)
        parts = list(training_batches(batches, 8, 0, 1))
        for part in parts:
            assert part.values.shape[0] == data.lengths[part.indices].max()
        spread = [np.ptp(data.lengths[part.indices]) for part in parts]
        assert np.mean(spread) < np.ptp(data.lengths) / 2

    def test_order_is_a_function_of_the_seed_alone(self) -> None:
        batches, _ = self.batches(variable=True)
        orders = [
            np.concatenate([part.indices for part in training_batches(batches, 8, *seed)])
            for seed in [(0, 1)] * 2 + [(0, 2)]
        ]
        assert (orders[0] == orders[1]).all()
        assert (orders[0] != orders[2]).any()

    def test_full_batches_carry_no_lengths(self) -> None:
        batches, _ = self.batches(variable=False)
        assert all(part.lengths is None for part in training_batches(batches, 8, 0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be at least 1.17549e-38, got 0.0"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, adam, rmsprop, sgd, got 'lion'"),
    ],
)
def test_a_configuration_out_of_range_names_rule_and_value(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainingConfig(**({"metric": "accuracy"} | given))
