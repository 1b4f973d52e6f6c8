"""The same data in another unit, with an offset, in another order, padded or in another format give the same model.

Up to rounding, and for networks that normalise: what a file is trained to predict must not depend on how somebody
happened to write it down. Each example trains two small networks, on a file and on the same content written otherwise,
and compares what they predict of other sequences, written in the same way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpo.models.bundle import bundle, export
from hpo.models.bundle.bundle import Bundle
from hpo.models.bundle.config import BundleConfig
from hpo.models.data.order import in_order
from hpo.models.data.sequences import from_arrays
from hpo.study.config import load
from hpo.study.plan import make_plan
from hpo.trial.build import build, configurations

Floats = NDArray[np.float64]
NAN = float("nan")
CLOSE = 1e-4  # between probabilities; rounding made 3e-6 of sixty such pairs, other data differ in the first digit


pytestmark = pytest.mark.usefixtures("one_thread")


# --------------------------------------------------------------------------------------------------- writing it down


@dataclass(frozen=True)
class Content:
    """Labelled sequences, each (T_i, F), NaN where a value is missing."""

    sequences: list[Floats]
    labels: list[str]

    @property
    def features(self) -> int:
        return len(self.sequences[0][0])


@dataclass(frozen=True)
class Writing:
    """How content is written down."""

    form: str = "npz"
    powers: tuple[int, ...] = (0, 0, 0)  # of ten: the unit of each feature
    offsets: tuple[float, ...] = (0.0, 0.0, 0.0)  # of each feature, in its unit
    columns: tuple[int, ...] = (0, 1, 2)  # the order of the features, where a form names them
    padding: int = 0  # steps without a value at the end of each sequence
    rows: int | None = None  # seed of another order of the rows

    def apply(self, content: Content) -> Content:
        """The content in this unit and order, padded."""
        powers, offsets = (np.array(given[: content.features], float) for given in (self.powers, self.offsets))
        found = [(one + offsets) * 10.0**powers for one in content.sequences]
        found = [np.pad(one, ((0, self.padding), (0, 0)), constant_values=NAN) for one in found]
        order = np.arange(len(found)) if self.rows is None else np.random.default_rng(self.rows).permutation(len(found))
        return Content([found[i] for i in order], [content.labels[i] for i in order])

    def write(self, content: Content, folder: Path) -> Path:
        names = [f"x{f}" for f in range(content.features)]
        named = [f for f in self.columns if f < content.features]
        return FORMS[self.form](folder, self.apply(content), names, named, self.rows)


def padded(content: Content) -> Floats:
    longest = max(map(len, content.sequences))
    return np.stack([np.pad(s, ((0, longest - len(s)), (0, 0)), constant_values=NAN) for s in content.sequences])


def write_npz(folder: Path, content: Content, *_: Any) -> Path:
    np.savez(folder / "waves.npz", X=padded(content), y=np.array(content.labels))
    return folder / "waves.npz"


def write_ts(folder: Path, content: Content, *_: Any) -> Path:
    lines = [
        ":".join([*(",".join(map(repr, feature)) for feature in one.T.tolist()), label])
        for one, label in zip(content.sequences, content.labels, strict=True)
    ]
    head = ["@problemName waves", "@univariate false", "@equalLength false", "@classLabel true a b", "@data"]
    (folder / "waves.ts").write_text("\n".join([*head, *lines]).replace("nan", "?") + "\n")
    return folder / "waves.ts"


def rows_of(content: Content, seed: int | None) -> list[tuple[int, int]]:
    """(sequence, step) of each row of the long form, in any order where there is a seed."""
    rows = [(i, t) for i, one in enumerate(content.sequences) for t in range(len(one))]
    return rows if seed is None else [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def write_long(folder: Path, content: Content, names: list[str], order: list[int], rows: int | None) -> Path:
    lines = ["id,step," + ",".join(names[f] for f in order) + ",label"]
    for i, t in rows_of(content, rows):
        cells = [str(content.sequences[i][t, f]) for f in order]
        lines.append(",".join([f"s{i}", str(t), *cells, content.labels[i]]))
    (folder / "waves.csv").write_text("\n".join(lines).replace("nan", "") + "\n")
    return folder / "waves.csv"


def write_parquet(folder: Path, content: Content, names: list[str], order: list[int], rows: int | None) -> Path:
    at = rows_of(content, rows)
    columns: dict[str, list[Any]] = {"label": [content.labels[i] for i, _ in at], "step": [t for _, t in at]}
    columns |= {names[f]: [float(content.sequences[i][t, f]) for i, t in at] for f in order}
    pq.write_table(pa.table(columns | {"id": [i for i, _ in at]}), folder / "waves.parquet")
    return folder / "waves.parquet"


def write_wide(folder: Path, content: Content, *_: Any) -> Path:
    """Of one feature alone."""
    values = padded(content)[:, :, 0].tolist()
    lines = ["label," + ",".join(f"t{t}" for t in range(len(values[0])))]
    lines += [",".join([label, *map(str, row)]) for label, row in zip(content.labels, values, strict=True)]
    (folder / "waves.csv").write_text("\n".join(lines).replace("nan", "") + "\n")
    return folder / "waves.csv"


FORMS: dict[str, Callable[..., Path]] = {
    "npz": write_npz,
    "ts": write_ts,
    "long": write_long,
    "parquet": write_parquet,
    "wide": write_wide,
}


# ------------------------------------------------------------------------------------------------------ training on it


def content_of(seed: int, features: int, n: int = 24, gaps: bool = True) -> Content:
    """Two classes, waves of two speeds, of 3 to 8 steps; some values are missing, of some sequences a whole feature."""
    random = np.random.default_rng(seed)
    labels = [("a", "b")[i % 2] for i in range(n)]
    found = []
    for i in range(n):
        steps = np.arange(random.integers(3, 9))
        wave = np.sin(steps[:, None] * (0.5 + (i % 2)) + random.uniform(0, 6, features))
        found.append(wave + 0.2 * random.normal(size=wave.shape))
    if gaps:
        for i in random.choice(n, 5, replace=False):
            found[i][random.integers(1, len(found[i]) - 1), random.integers(features)] = NAN
        for i in random.choice(n, 3 if features > 1 else 0, replace=False):
            found[i][:, random.integers(features)] = NAN
    return Content(found, labels)


NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patches": {"patch_length": 2, "pooling": "last", "mixup": 0.2, "skip": True},
    "mask": {"missing": "mask", "difference": True, "patch_length": 2, "mixup": 0.2, "jitter": 0.05},
    "convolutions": {
        "stem": "conv", "stem_layers": 2, "stem_width": 4, "stem_kernel": 3, "stem_stride": 2, "difference": True,
        "pooling": "concat", "jitter": 0.05, "label_smoothing": 0.1, "learning_rate": 0.01,
    },
}  # fmt: skip


def train(content: Content, writing: Writing, normalization: str, network: str = "plain") -> Bundle:
    """A network of ten epochs on the content, written so and read by `hpo launch`'s way."""
    with tempfile.TemporaryDirectory() as folder:
        config = load(writing.write(content, Path(folder)), ["data.validation=0.25", "data.holdout=0.2"])
        plan, sequences, _ = make_plan(config)
    params = {
        "normalization": normalization,
        "hidden_size": 5,
        "learning_rate": 0.05,
        "batch_size": 8,
        "pooling": "mean",
        **NETWORKS[network],
    }
    with build(plan, params, 3, sequences, "cpu", native=False) as training:
        for _ in range(10):
            training.advance()
        classifier, _ = configurations(plan, params, 3)
        names = {"classes": plan.classes, "features": plan.features, "named": plan.named, "fill": plan.fill}
        return bundle.assemble(BundleConfig(classifier, metric="auroc", **names), training.best_weights)  # type: ignore[arg-type]


def predicted(model: Bundle, content: Content, writing: Writing) -> NDArray[np.float32]:
    with tempfile.TemporaryDirectory() as folder:
        return model.predict(model.read(replace(writing, rows=None).write(content, Path(folder)))).probabilities


@lru_cache
def plain(seed: int, features: int, normalization: str, network: str = "plain") -> NDArray[np.float32]:
    """What a network predicts that was trained on the content as it is."""
    content = content_of(seed, features)
    return predicted(train(content, Writing(), normalization, network), content_of(seed + 1, features), Writing())


units = st.tuples(*[st.integers(-12, 12)] * 3)
offsets = st.tuples(*[st.floats(-20, 20)] * 3)
writings = st.builds(
    Writing,
    form=st.sampled_from(sorted(FORMS)),
    powers=units,
    offsets=offsets,
    columns=st.permutations((0, 1, 2)).map(tuple),
    padding=st.integers(0, 3),
    rows=st.none() | st.integers(0, 1000),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(Writing("long", columns=(1, 0, 2)), "channel", "convolutions", 0, 2)
@given(
    writings,
    st.sampled_from(["channel", "sequence"]),
    st.sampled_from(list(NETWORKS)),
    st.integers(0, 3),
    st.integers(1, 3),
)
def test_what_is_written_otherwise_is_the_same_model(
    writing: Writing, normalization: str, network: str, seed: int, features: int
) -> None:
    features = 1 if writing.form == "wide" else features
    content, other = content_of(seed, features), content_of(seed + 1, features)
    found = predicted(train(content, writing, normalization, network), other, writing)
    np.testing.assert_allclose(found, plain(seed, features, normalization, network), atol=CLOSE)


def test_other_data_are_another_model() -> None:
    """So the property above could fail."""
    assert np.abs(plain(2, 2, "channel") - plain(3, 2, "channel")).max() > 1000 * CLOSE
    turned = Writing("long", columns=(1, 0, 2))
    content = content_of(2, 2)
    swapped = Content([one[:, ::-1] for one in content.sequences], content.labels)
    found = predicted(train(swapped, turned, "channel"), content_of(3, 2), Writing())
    assert np.abs(found - plain(2, 2, "channel")).max() > 1000 * CLOSE


@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("normalization", ["channel", "sequence"])
def test_exported_it_is_the_same_model(tmp_path: Path, format: str, normalization: str) -> None:
    writing = Writing("long", (-9, 6, 0), (15.0, -7.0, 0.0), (1, 0, 2), rows=5)
    content, other = content_of(0, 2), content_of(1, 2, gaps=False)
    expected = predicted(train(content, Writing(), normalization), other, Writing())
    model = train(content, writing, normalization)
    states = [{name: tensor.clone() for name, tensor in each.state_dict().items()} for each in model.models]
    folder = bundle.save(tmp_path / "model", states, model.config, {"train_loss": [1.0], "value": [1.0]})
    out = export.export(folder, tmp_path / "out", format)
    graph = getattr(export, f"_run_{format}")(out / f"model.{format}")
    data = model.read(replace(writing, rows=None).write(other, tmp_path))
    for padding in (0, 4):
        values = np.pad(data.values, ((0, 0), (0, padding), (0, 0)), constant_values=NAN)
        np.testing.assert_allclose(graph(values, data.lengths), expected, atol=CLOSE)
        backwards = graph(values[::-1].copy(), data.lengths[::-1].copy())
        np.testing.assert_allclose(backwards, expected[::-1], atol=CLOSE)


# ------------------------------------------------------------------------------------------------------------ the order


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_order_is_one_of_the_content_alone(drawn: st.DataObject) -> None:
    """Few values, so that many sequences are alike for a while or altogether."""
    n, features = drawn.draw(st.integers(1, 8)), drawn.draw(st.integers(1, 2))
    value = st.sampled_from([-1.0, 0.0, 2.0])
    parts = [
        np.array(drawn.draw(st.lists(st.tuples(*[value] * features), min_size=1, max_size=3)), float) for _ in range(n)
    ]
    labels = drawn.draw(st.lists(st.sampled_from("ab"), min_size=n, max_size=n))
    groups = [f"g{len(part)}{label}" for part, label in zip(parts, labels, strict=True)]
    lengths = [len(part) for part in parts]
    data = in_order(from_arrays(padded(Content(parts, labels)), labels, lengths, groups))
    keys = [
        (length, values[:length].tolist(), label)
        for values, length, label in zip(data.values, data.lengths.tolist(), data.labels.tolist(), strict=True)  # type: ignore[union-attr]
    ]
    assert keys == sorted(keys)
    order = drawn.draw(st.permutations(range(n)))
    shuffled = Content([3.0 * parts[i] + 5.0 for i in order], [labels[i] for i in order])
    again = in_order(
        from_arrays(padded(shuffled), shuffled.labels, [lengths[i] for i in order], [groups[i] for i in order])
    )
    inside = np.arange(data.steps) < data.lengths[:, None]
    np.testing.assert_array_equal(again.values[inside], 3 * data.values[inside] + 5)
    for name in ("lengths", "labels", "groups"):
        np.testing.assert_array_equal(getattr(again, name), getattr(data, name))
