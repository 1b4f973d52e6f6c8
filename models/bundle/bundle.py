"""The saved model: a folder that loads and predicts without database and without pickle.

    model.safetensors   weights of the k members, "member.<i>.<name>"
    config.json         what the weights are: `BundleConfig` and the format's version
    README.md           model card: scores, how to use it with and without this project
    curves.svg, confusion.svg, reliability.svg
    report.html         of the study that it comes from; models of earlier versions have none
    SHA256SUMS          of all these, as `sha256sum -c` reads them; earlier versions wrote none

Shapes: N sequences, T steps, F features, K classes, k members whose probabilities are averaged, then calibrated. They
are of one configuration, or of several (`Component`), one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialize_tensors
from torch import Tensor

from hpo.models.bundle import card, pictures
from hpo.models.bundle.checksums import SUMS, check_folder, write_checksums
from hpo.models.bundle.config import BundleConfig, BundleError, from_json, to_json
from hpo.models.bundle.predictions import Predictions
from hpo.models.classifier import Classifier, Weights, averaged, weights_of
from hpo.models.config import ClassifierConfig
from hpo.models.data.gaps import TIMES_NEEDED, inputs, usual_distance
from hpo.models.data.readers import read
from hpo.models.data.sequences import DataError, Indices, Sequences, Values, joined, matched
from hpo.models.device import device_errors
from hpo.models.files import whole_folder
from hpo.models.metrics import predict_labels

log = logging.getLogger("hpo")

SOME = 0.01  # share of missing values that is worth no word
APART = 100  # times the usual distance of two steps in training, or a part of it, that is worth a word
REPORT = "report.html"
FILES = ("model.safetensors", "config.json", "README.md", *card.PICTURES, REPORT)
TYPES = {"torch.float32", "torch.float64", "torch.float16", "torch.bfloat16"}  # of weights, which become float32
LARGEST_OTHER = 32 * 2**20  # bytes of a file other than the weights; a thousand classes have some megabytes of counts


@dataclass(frozen=True, eq=False)
class Bundle:
    """A model ready to predict."""

    config: BundleConfig
    models: tuple[Classifier, ...]  # (k,) in evaluation mode, on one device
    folder: Path | None = None  # that it was loaded from

    def predict(self, data: Any, batch_size: int = 256, progress: Callable[[int], object] | None = None) -> Predictions:
        """Class and probabilities of each sequence; labels are ignored.

        data is a `Sequences`, a data frame, or whatever `from_arrays` takes as X: (N, T, F), (N, T), or a list of
        (T_i, F) or (T_i,). Features with names are matched by name, in any order and among others; where the data or
        the training data have none, by place. `progress` is called after
        each batch with the number of its sequences. Raises DataError where features or lengths do not fit the
        model, ValueError where `batch_size` is below 1, OutOfMemory and DeviceLost.
        """
        sequences = self.conform(data)
        return self._predictions(sequences.ids, self._computed(sequences, batch_size, progress))

    def predict_each(self, parts: Sequence[Sequences], batch_size: int = 256) -> list[Predictions | DataError]:
        """What `predict` says of each of several data, or raises for it, computed together: up to rounding in the last
        bits, which go by what else is in a batch.

        parts: what `conform` gave. Raises OutOfMemory and DeviceLost.
        """
        probabilities = self._computed(joined(parts), batch_size, None)
        found: list[Predictions | DataError] = []
        end = 0
        for part in parts:
            begin, end = end, end + part.n
            try:
                found.append(self._predictions(part.ids, probabilities[begin:end]))
            except DataError as error:
                found.append(error)
        return found

    def _predictions(self, ids: tuple[str, ...], probabilities: NDArray[np.float32]) -> Predictions:
        """Labels of probabilities (N, K). Raises DataError where one is none."""
        for row in np.flatnonzero(~np.isfinite(probabilities).all(axis=1)).tolist():
            rule = "the model gives it no probability: its values, or the model's weights, are too large"
            raise DataError(f"sequence {ids[row]!r}: {rule}")
        labels = np.array(self.config.classes)[predict_labels(probabilities, self.config.threshold)]
        return Predictions(self.config.classes, probabilities, labels, ids)

    def read(self, data: Any, *, labeled: bool = False, **columns: str) -> Sequences:
        """Sequences of a file, data frame or array for `predict`. Labels are read if `labeled`.

        columns: of a table those of `label`, `id`, `step`, `group`, `time` and `weight` that are called otherwise than
        in training. Raises DataError.
        """
        wanted: dict[str, Any] = {
            **self.config.columns,
            **columns,
            "needed": tuple(columns),
            "features": self.config.features,
            "named": self.config.has_names,
        }
        if not labeled:
            return read(data, labeled=False, **wanted)
        return read(data, classes=self.config.classes, **wanted)  # and groups where there are some

    def conform(self, data: Any) -> Sequences:
        """`data` with the model's features in the model's order, and its means where a sequence lacks one throughout.

        Warns of features that are missing more often than in training, and of times that seem to be in another unit.
        Raises DataError where features or lengths do not fit, or times are needed that the data do not have.
        """
        sequences = data if isinstance(data, Sequences) else self.read(data)
        sequences = matched(sequences, self.config.features, self.config.has_names)
        self._check_lengths(sequences)
        self._compare_gaps(sequences)
        self._compare_intervals(sequences)
        return sequences if self.config.fill is None else sequences.filled_with(self.config.fill)

    def _compare_gaps(self, sequences: Sequences) -> None:
        """Warn of features with many more missing values than the training file had."""
        if sequences.gaps is None or self.config.gaps is None:
            return
        rows = zip(self.config.features, sequences.gaps, self.config.gaps, strict=True)
        more = [
            f"{name!r} {found:.1%} (in training {known:.1%})" for name, found, known in rows if found > 2 * known + SOME
        ]
        if more:
            shown = ", ".join(more[:10]) + (f" and {len(more) - 10} more" if more[10:] else "")
            log.warning("more values are missing than the model met in training, and are filled: %s", shown)

    def _compare_intervals(self, sequences: Sequences) -> None:
        """Raise DataError where the networks need times that the data do not have; warn of times that seem to have
        another unit than in training."""
        config = self.config.widest
        if config.marks < 2:
            return
        far = usual_distance(sequences)
        if far is None:
            raise DataError(f"the data do not say when the steps of a sequence were: {TIMES_NEEDED}")
        if far and not 1 / APART <= far / config.interval <= APART:
            text = "the steps are %g apart, in training %g: times must be dates or numbers as in training, in its unit"
            log.warning(text, far, config.interval)

    def _check_lengths(self, sequences: Sequences) -> None:
        """Pooling `flatten` has weights for each step, so that every sequence must have as many."""
        for each in self.config.components:
            if each.classifier.pooling == "flatten":
                self._check_flattened(sequences, each.classifier)

    def _check_flattened(self, sequences: Sequences, config: ClassifierConfig) -> None:
        kept = np.minimum(sequences.lengths, config.sequence_length or sequences.steps)
        for row in np.flatnonzero(kept != config.kept_steps)[:1].tolist():
            needed = f"exactly {config.steps}" if config.fixed_length else f"{config.kept_steps} or more"
            found = f"sequence {sequences.ids[row]!r} has {sequences.lengths[row]}"
            raise DataError(f"a model with flatten pooling needs {needed} steps, {found}")

    def _computed(
        self, sequences: Sequences, batch_size: int, progress: Callable[[int], object] | None
    ) -> NDArray[np.float32]:
        with device_errors(self.models[0].mean.device, lambda: f"{batch_size} sequences at once; take a smaller batch"):
            return self._probabilities(sequences, batch_size, progress)

    @torch.inference_mode()
    def _probabilities(
        self, sequences: Sequences, batch_size: int, progress: Callable[[int], object] | None
    ) -> NDArray[np.float32]:
        """(N, K), averaged over the members and calibrated, in batches of like length."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        order = np.argsort(sequences.lengths, kind="stable")
        result = np.empty((sequences.n, len(self.config.classes)), np.float32)
        for start in range(0, sequences.n, batch_size):
            rows = order[start : start + batch_size]
            result[rows] = self._batch(sequences, rows)
            if progress is not None:
                progress(len(rows))
        return result

    def _inputs(self, sequences: Sequences, rows: Indices, steps: int) -> Values:
        """What the networks are given of these rows, (B, steps, given): of each as much as it takes, from the left."""
        if not self.config.widest.marks:
            return sequences.values[rows, :steps]
        return inputs(sequences.take(rows), self.config.widest)[:, :steps]

    def _batch(self, sequences: Sequences, rows: Indices) -> NDArray[np.float32]:
        """(B, K) of these rows, the longest last."""
        device, lengths = self.models[0].mean.device, sequences.lengths[rows]
        values = self._inputs(sequences, rows, int(lengths[-1]))
        whole = bool((lengths == values.shape[1]).all())  # no padding: the faster path
        batch, steps = torch.from_numpy(values).to(device), torch.from_numpy(lengths).to(device)
        found = []
        for model in self.models:
            patches, counts = model.prepare(batch[..., : model.config.given], steps)
            found.append(model.logits(patches, None if whole else counts))
        probabilities = averaged(found, self.config.temperature, self.config.weights)
        return cast(NDArray[np.float32], probabilities.cpu().numpy())


def save(
    folder: str | Path,
    members: Sequence[Weights],
    config: BundleConfig,
    curve: Mapping[str, Sequence[float]],
    *,
    report: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a saved model and return its folder, which appears whole or not at all.

    members: k states of a `Classifier`, by component. curve: per-epoch numbers by name, "train_loss" and "value" (of
    the metric) at least, "log_loss" if at hand. report: HTML of the study, to lie beside the card. `overwrite` replaces
    a saved model, never another folder. Raises BundleError and OSError.
    """
    if len(members) != config.networks:
        raise BundleError(f"the configuration is of {config.networks} networks, got the weights of {len(members)}")
    content = pack(members)
    _models(config, parse_tensors(content), "these weights")  # they fit the configuration
    with model_folder(Path(folder), overwrite) as beside:
        (beside / "model.safetensors").write_bytes(content)
        (beside / "config.json").write_text(to_json(config), encoding="utf-8")
        drawn = _pictures(config, curve)
        for name, picture in drawn.items():
            (beside / name).write_bytes(picture)
        (beside / "README.md").write_text(card.readme(config, pictures=drawn), encoding="utf-8")
        if report is not None:
            (beside / REPORT).write_text(report, encoding="utf-8")
    return Path(folder)


def _pictures(config: BundleConfig, curve: Mapping[str, Sequence[float]]) -> dict[str, bytes]:
    """The card's pictures by the names of their files."""
    scores, part = config.test or config.validation, "test" if config.test else "validation"
    matrix = None if scores is None else pictures.confusion_picture(scores.confusion, config.classes, part)
    diagram = pictures.reliability_picture(config.calibration, config.temperature) if config.calibration else None
    drawn = (pictures.curves(curve, config.best_epoch, config.metric), matrix, diagram)
    return {name: content for name, content in zip(card.PICTURES, drawn, strict=True) if content is not None}


def load(folder: str | Path, device: str = "cpu") -> Bundle:
    """Load a saved model, once every file is what its SHA256SUMS says.

    Whoever wrote the folder: no code of it runs, every field has its type, weights are finite and have the sizes that
    the configuration asks for, and loading takes at most 64 MiB, 8 times the weights and 64 times config.json.

    Raises BundleError, which names a damaged file or lists what is missing and what is unexpected, in one line.
    """
    folder = Path(folder)
    try:
        _check_files(folder)
        check_folder(folder)
        config = from_json((folder / "config.json").read_bytes(), str(folder / "config.json"))
        source = folder / "model.safetensors"
        _check_size(config, source.stat().st_size, str(source))
        tensors = parse_tensors(source.read_bytes())
    except OSError as error:
        raise BundleError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # the last ones of types that torch lacks
        raise BundleError(f"{source} is not a whole safetensors file ({error}); fetch or export it again") from None
    models = _models(config, tensors, str(source))
    return Bundle(config, tuple(model.place(torch.device(device)) for model in models), folder)


def _check_files(folder: Path) -> None:
    """Raise BundleError where the files of a saved model are not there, are something else, or are far too large."""
    missing = [name for name in FILES[:2] if not (folder / name).is_file()]
    if missing:
        raise BundleError(f"{folder} is no saved model: it lacks {' and '.join(missing)}")
    for path in (folder / name for name in (*FILES[1:], *card.PICTURES_BEFORE, SUMS)):
        if path.exists() and not path.is_file():
            raise BundleError(f"{path} is no file: fetch or export the model again")
        if path.exists() and path.stat().st_size > LARGEST_OTHER:
            raise BundleError(f"{path} is larger than {LARGEST_OTHER:,} bytes: fetch or export the model again")


def _check_size(config: BundleConfig, size: int, source: str) -> None:
    """Raise BundleError for a file whose size in bytes is not that of the configuration's weights."""
    count = tensors = 0
    for each in config.components:
        numbers, names = weights_of(each.classifier)
        count, tensors = count + each.members * numbers, tensors + each.members * names
    if size < count or size > 8 * count + 1_000 * tensors + 2**20:
        wanted = f"{_members_said(config)}, {count:,} numbers together"
        rule = f"{size:,} bytes are too few or too many for {wanted}"
        raise BundleError(f"{source} does not fit the configuration: {rule}")


def _members_said(config: BundleConfig) -> str:
    """In words, for a message."""
    return " and ".join(f"{each.members} members of {each.classifier.layers} layers" for each in config.components[:5])


def assemble(config: BundleConfig, members: Sequence[Weights], device: str = "cpu") -> Bundle:
    """The bundle that `save` would write, in memory. Raises BundleError."""
    models = _models(config, parse_tensors(pack(members)), "these weights")
    return Bundle(config, tuple(model.place(torch.device(device)) for model in models))


def pack(members: Sequence[Weights]) -> bytes:
    """The members' weights as one safetensors file, keys "member.<i>.<name>"."""
    named = {f"member.{i}.{name}": tensor for i, member in enumerate(members) for name, tensor in member.items()}
    return serialize_tensors({name: tensor.detach().cpu().clone().contiguous() for name, tensor in named.items()})


def unpack(content: bytes) -> list[Weights]:
    """The members' weights of a file that `pack` made. Raises BundleError for another one."""
    members: dict[int, Weights] = {}
    try:
        for key, tensor in parse_tensors(content).items():
            _, index, name = key.split(".", 2)
            members.setdefault(int(index), {})[name] = tensor
    except (SafetensorError, ValueError) as error:
        raise BundleError(f"{len(content)} bytes are no weights of a model: {error}") from error
    return [members[index] for index in sorted(members)]


@contextmanager
def model_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder to write a saved model into, which gets its checksums and becomes `out` when the block ends, and is
    removed if it raises.

    Only an empty folder or, with `overwrite`, a saved model is replaced. Raises BundleError and OSError.
    """
    _check_free(out.resolve(), overwrite)
    with whole_folder(out) as beside:
        yield beside
        write_checksums(beside)


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "config.json").is_file() or not (out / "model.safetensors").is_file():
        raise BundleError(f"{out} exists and is no saved model: name a new folder")
    if not overwrite:
        raise BundleError(f"{out} holds a saved model already: name a new folder, or overwrite it")


def _models(config: BundleConfig, tensors: dict[str, Tensor], source: str) -> list[Classifier]:
    """The members in evaluation mode, once every tensor is there in its shape and no other."""
    models = []
    needed = sum(each.members * weights_of(each.classifier)[1] for each in config.components)
    if needed > len(tensors):  # before as many are made
        raise BundleError(
            f"{source} does not fit the configuration: {len(tensors)} tensors are too few for {_members_said(config)}"
        )
    for classifier in config.configurations:
        with torch.device("meta"):  # no memory, and no random initial weights drawn from the caller's state
            models.append(Classifier(classifier).eval().requires_grad_(False))
    wanted = {f"member.{i}.{name}": t for i, model in enumerate(models) for name, t in model.state_dict().items()}
    faults = [f"missing {name}" for name in wanted if name not in tensors]
    faults += [f"unexpected {name}" for name in sorted(tensors) if name not in wanted]
    faults += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if faults:
        raise BundleError(f"{source} does not fit the configuration: {'; '.join(faults)}")
    if other := sorted({str(tensors[name].dtype) for name in wanted} - TYPES):
        raise BundleError(f"{source} must hold numbers of type {', '.join(sorted(TYPES))}, got {', '.join(other)}")
    tensors = {name: tensors[name].float() for name in wanted}
    if broken := [name for name in wanted if not tensors[name].isfinite().all()]:
        raise BundleError(f"{source} must hold finite numbers; these hold others: {', '.join(broken)}")
    for i, model in enumerate(models):
        state = {name: tensors[f"member.{i}.{name}"] for name in model.state_dict()}
        model.load_state_dict(state, assign=True)
    return models
