"""Every reader gives the same `Sequences`; every fault in a file has its answer; the canonical file is exact."""

import csv
import hashlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpo.models.data.canonical import fingerprint, load, save, to_bytes
from hpo.models.data.readers import READERS, read
from hpo.models.data.sequences import DataError, Sequences, from_arrays
from hpo.models.data.splits import check_trainable

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
NAN = float("nan")


# ------------------------------------------------------------------ one content, written in every form


@dataclass(frozen=True)
class Content:
    """N sequences (T_i, F); NaN is missing. Labels and groups (N,) or none."""

    sequences: list[list[list[float]]]
    labels: list[Any] | None = None
    groups: list[Any] | None = None

    def extras(self) -> dict[str, list[Any]]:
        given = {"label": self.labels, "group": self.groups}
        return {name: values for name, values in given.items() if values is not None}


def cell(value: float) -> str:
    return "" if value != value else repr(value)


def write_npz(path: Path, content: Content) -> None:
    lengths = [len(sequence) for sequence in content.sequences]
    X = np.full((len(lengths), max(lengths, default=0) + 1, len(content.sequences[0][0])), NAN)
    for x, sequence in zip(X, content.sequences, strict=True):
        x[: len(sequence)] = sequence
    given = {"y": content.labels, "groups": content.groups}
    arrays: dict[str, Any] = {name: np.array(values) for name, values in given.items() if values is not None}
    np.savez(path, X=X, **arrays)


def write_long(path: Path, content: Content) -> None:
    features = [f"x{f}" for f in range(len(content.sequences[0][0]))]
    extras = content.extras()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "step", *features, *extras])
        for i, sequence in enumerate(content.sequences):
            for t, step in enumerate(sequence):
                writer.writerow([i, t, *map(cell, step), *(values[i] for values in extras.values())])


def write_parquet(path: Path, content: Content) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [(i, t, step) for i, sequence in enumerate(content.sequences) for t, step in enumerate(sequence)]
    columns: dict[str, list[Any]] = {"id": [row[0] for row in rows], "step": [row[1] for row in rows]}
    for f in range(len(content.sequences[0][0])):
        columns[f"x{f}"] = [None if step[f] != step[f] else step[f] for _, _, step in rows]
    for name, values in content.extras().items():
        columns[name] = [values[i] for i, _, _ in rows]
    pq.write_table(pa.table(columns), path)


def write_ts(path: Path, content: Content) -> None:
    labels = content.labels or []
    classes = " ".join(sorted(map(str, set(labels))))
    lines = ["# any words", "@problemName any", "@timeStamps false", "@missing true", "@equalLength false"]
    lines += [f"@univariate {str(len(content.sequences[0][0]) == 1).lower()}"]
    lines += [f"@classLabel true {classes}" if labels else "@classLabel false", "@data"]
    for i, sequence in enumerate(content.sequences):
        channels = [",".join(cell(value) or "?" for value in channel) for channel in zip(*sequence, strict=True)]
        lines.append(":".join([*channels, *map(str, labels[i : i + 1])]))
    path.write_text("\n".join(lines) + "\n")


def write_wide(path: Path, content: Content) -> None:
    longest = max(len(sequence) for sequence in content.sequences)
    extras = content.extras()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"t{t}" for t in range(longest)), *extras])
        for i, sequence in enumerate(content.sequences):
            cells = [cell(value) for (value,) in sequence] + [""] * (longest - len(sequence))
            writer.writerow([*cells, *(values[i] for values in extras.values())])


Writer = Callable[[Path, Content], None]
FORMS: dict[str, tuple[str, Writer]] = {
    "npz": ("data.npz", write_npz),
    "long": ("long.csv", write_long),
    "parquet": ("data.parquet", write_parquet),
    "ts": ("data.ts", write_ts),
    "wide": ("wide.csv", write_wide),  # univariate only
}
FEATURES = {"npz": 2, "long": 2, "parquet": 2, "ts": 2, "wide": 1}


def series(form: str, *sequences: list[float]) -> list[list[list[float]]]:
    """Sequences with as many features as the form has, each feature the first plus its number."""
    return [[[value + f for f in range(FEATURES[form])] for value in sequence] for sequence in sequences]


def differences(a: Sequences, b: Sequences) -> list[str]:
    """The names of the fields that differ."""
    pairs = [(field.name, getattr(a, field.name), getattr(b, field.name)) for field in fields(a)]
    return [name for name, x, y in pairs if (x is None) != (y is None) or not np.array_equal(x, y)]


@pytest.mark.parametrize("form", FORMS)
class TestReaders:
    """The contract of a reader."""

    def write(self, folder: Path, form: str, content: Content) -> Path:
        name, writer = FORMS[form]
        writer(folder / name, content)
        return folder / name

    def test_reads_ragged_sequences_with_labels(self, form: str, tmp_path: Path) -> None:
        content = Content(series(form, [1.5, 2.5], [3.0], [4.0, -5.0, 6e-3]), ["dog", "cat", "dog"])
        data = read(self.write(tmp_path, form, content))
        F = FEATURES[form]
        offsets = np.arange(F)
        expected = np.array([[1.5, 2.5, 0], [3, 0, 0], [4, -5, 6e-3]])[:, :, None] + offsets
        expected[0, 2:] = expected[1, 1:] = 0
        np.testing.assert_array_equal(data.values, expected.astype(np.float32))
        assert data.values.dtype == np.float32
        assert (data.n, data.steps, data.n_features) == (3, 3, F)
        assert data.lengths.tolist() == [2, 1, 3]
        assert data.labels is not None
        assert data.labels.tolist() == [1, 0, 1]
        assert data.classes == ("cat", "dog")
        assert data.groups is None
        assert data.ids == ("0", "1", "2")
        assert data.features == tuple(f"x{f}" for f in range(F))
        assert data.filled == 0

    def test_fills_missing_values_within_a_sequence(self, form: str, tmp_path: Path) -> None:
        gaps = [[NAN, 1.0, NAN, NAN, 4.0], [7.0, NAN, 8.0]]
        content = Content(series(form, *gaps), [0, 1])
        data = read(self.write(tmp_path, form, content))
        assert data.values[0, :, 0].tolist() == [1, 1, 2, 3, 4]
        assert data.values[1, :3, 0].tolist() == [7, 7.5, 8]
        assert data.filled == 4 * FEATURES[form]

    def test_trailing_missing_steps_are_padding(self, form: str, tmp_path: Path) -> None:
        content = Content(series(form, [1.0, 2.0, NAN, NAN], [3.0, 4.0, 5.0]), [0, 1])
        data = read(self.write(tmp_path, form, content))
        assert data.lengths.tolist() == [2, 3]
        assert data.steps == 3
        assert data.filled == 0
        assert not data.values[0, 2].any()

    def test_numeric_labels_are_named_and_ordered_as_numbers(self, form: str, tmp_path: Path) -> None:
        data = read(self.write(tmp_path, form, Content(series(form, [1.0], [2.0], [3.0]), [10, -1, 9])))
        assert data.classes == ("-1", "9", "10")

    def test_whole_floats_as_labels_are_named_as_whole_numbers(self, form: str, tmp_path: Path) -> None:
        data = read(self.write(tmp_path, form, Content(series(form, [1.0], [2.0]), [1.0, 2.0])))
        assert data.classes == ("1", "2")

    def test_data_without_labels_is_read_where_labels_are_not_demanded(self, form: str, tmp_path: Path) -> None:
        path = self.write(tmp_path, form, Content(series(form, [1.0], [2.0])))
        data = read(path, classes=("a", "b"))
        assert data.labels is None
        assert data.classes == ("a", "b")
        with pytest.raises(DataError, match=r"has no label"):
            read(path, labeled=True)

    def test_labels_are_left_alone_where_they_are_not_wanted(self, form: str, tmp_path: Path) -> None:
        path = self.write(tmp_path, form, Content(series(form, [1.0], [2.0]), ["new", "newer"]))
        data = read(path, classes=("a",), labeled=False)
        assert data.labels is None
        assert data.n_features == FEATURES[form]

    def test_labels_are_encoded_with_the_classes_of_the_training_data(self, form: str, tmp_path: Path) -> None:
        path = self.write(tmp_path, form, Content(series(form, [1.0], [2.0]), ["b", "c"]))
        data = read(path, classes=("a", "b", "c"))
        assert data.labels is not None
        assert data.labels.tolist() == [1, 2]
        with pytest.raises(DataError, match=rf"{path.name}, \w+ \d+: label 'c' is not a class .*\(a, b\)"):
            read(path, classes=("a", "b"))

    def test_an_infinite_value_is_refused_with_its_place(self, form: str, tmp_path: Path) -> None:
        place = r"{name}, \w+ \d+, step 1, feature 'x0' is infinite: .*correct it"
        for value in (float("inf"), -float("inf"), 1e39):
            path = self.write(tmp_path, form, Content(series(form, [1.0, value], [2.0]), [0, 1]))
            with pytest.raises(DataError, match=place.format(name=path.name)):
                read(path)

    def test_a_sequence_without_a_value_is_refused_with_its_place(self, form: str, tmp_path: Path) -> None:
        path = self.write(tmp_path, form, Content(series(form, [1.0, 2.0], [NAN, NAN]), [0, 1]))
        with pytest.raises(DataError, match=rf"{path.name}, \w+ \d+ has length 0"):
            read(path)

    def test_an_empty_file_is_refused(self, form: str, tmp_path: Path) -> None:
        path = tmp_path / FORMS[form][0]
        path.touch()
        with pytest.raises(DataError, match=rf"{path.name} is empty"):
            read(path)

    def test_a_file_that_is_not_there_is_refused(self, form: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot be read: No such file"):
            read(tmp_path / FORMS[form][0])

    def test_constant_features_are_kept(self, form: str, tmp_path: Path) -> None:
        data = read(self.write(tmp_path, form, Content(series(form, [5.0, 5.0], [5.0, 5.0]), [0, 1])))
        assert (data.values[:, :, 0] == 5).all()

    def test_features_are_counted_against_those_of_the_training_data(self, form: str, tmp_path: Path) -> None:
        path = self.write(tmp_path, form, Content(series(form, [1.0], [2.0]), [0, 1]))
        with pytest.raises(DataError, match=rf"{path.name}.* (has \d features, expected 3|no feature column 'b')"):
            read(path, features=("x0", "b", "x1"))


@st.composite
def contents(draw: st.DrawFn, F: int | None = None) -> Content:
    F = F or draw(st.integers(1, 3))
    value = st.floats(-1e6, 1e6, width=32) | st.just(NAN)
    step = st.lists(value, min_size=F, max_size=F)
    sequences = draw(st.lists(st.lists(step, min_size=1, max_size=6), min_size=1, max_size=6))
    assume(all(any(v == v for s in sequence for v in s) for sequence in sequences))
    n = len(sequences)
    label = draw(st.sampled_from([st.integers(-3, 12), st.sampled_from(["ab", "Ünder", "07", "x_1"])]))
    column = draw(st.none() | st.lists(label, min_size=n, max_size=n))
    groups = draw(st.none() | st.lists(st.integers(0, 3), min_size=n, max_size=n))
    return Content(sequences, column, groups)


def read_all(content: Content, forms: list[str]) -> dict[str, Sequences]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in forms:
            name, writer = FORMS[form]
            writer(Path(folder) / name, content)
            found[form] = read(Path(folder) / name)
    return found


@settings(max_examples=40, deadline=None)
@given(contents())
def test_every_form_gives_the_same_sequences(content: Content) -> None:
    found = read_all(content, ["npz", "long", "parquet"])
    assert differences(found["npz"], found["long"]) == []
    assert differences(found["npz"], found["parquet"]) == []
    assert len({fingerprint(data) for data in found.values()}) == 1
    without_groups = read_all(replace(content, groups=None), ["npz", "ts"])
    assert differences(without_groups["npz"], without_groups["ts"]) == []


@settings(max_examples=25, deadline=None)
@given(contents(F=1))
def test_wide_and_long_form_give_the_same_univariate_sequences(content: Content) -> None:
    found = read_all(content, ["wide", "long"])
    assert differences(found["wide"], found["long"]) == []


# ------------------------------------------------------------------ what only some forms have


def text(folder: Path, name: str, *lines: str) -> Path:
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown suffix '.xlsx'; known are .npz, .csv, .parquet, .ts"):
        read(tmp_path / "data.xlsx")


def test_the_suffix_is_read_in_any_case(tmp_path: Path) -> None:
    assert read(text(tmp_path, "DATA.CSV", "t0,t1,label", "1,2,a")).n == 1


def test_a_constant_zero_fills_a_feature_that_a_sequence_lacks() -> None:
    data = from_arrays([[[1.0, NAN], [2.0, NAN]], [[3.0, 4.0], [5.0, 6.0]]])
    assert data.values[0].tolist() == [[1, 0], [2, 0]]
    assert data.filled == 2


class TestNpz:
    def save(self, folder: Path, **arrays: Any) -> Path:
        np.savez(folder / "data.npz", **arrays)
        return folder / "data.npz"

    def test_explicit_lengths_make_what_follows_padding(self, tmp_path: Path) -> None:
        X = np.arange(12, dtype=float).reshape(2, 3, 2)
        data = read(self.save(tmp_path, X=X, y=[0, 1], lengths=[2, 1]))
        assert data.values.tolist() == [[[0, 1], [2, 3]], [[6, 7], [0, 0]]]

    def test_missing_values_within_explicit_lengths_are_filled(self, tmp_path: Path) -> None:
        data = read(self.save(tmp_path, X=[[1.0, NAN, NAN]], lengths=[2]))
        assert data.lengths.tolist() == [2]
        assert data.values[0, :, 0].tolist() == [1, 1]

    @pytest.mark.parametrize("length", [0, -1, 4])
    def test_lengths_must_fit(self, length: int, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=rf"data.npz, sequence 1 has length {length}: .*1 to 3 steps"):
            read(self.save(tmp_path, X=np.ones((2, 3)), lengths=[1, length]))

    @pytest.mark.parametrize("length", [1.5, NAN, "2"])
    def test_lengths_must_be_whole_numbers(self, length: Any, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="sequence 0: lengths must be whole numbers"):
            read(self.save(tmp_path, X=np.ones((1, 3)), lengths=[length]))

    def test_two_dimensions_are_univariate(self, tmp_path: Path) -> None:
        assert read(self.save(tmp_path, X=np.ones((4, 5)))).values.shape == (4, 5, 1)

    @pytest.mark.parametrize("X", [np.ones(3), np.ones((1, 1, 1, 1)), np.array([["a"]]), np.ones((1, 2), complex)])
    def test_other_shapes_and_types_are_refused(self, X: NDArray[Any], tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"X must be numbers \(N, T, F\) or \(N, T\), got"):
            read(self.save(tmp_path, X=X))

    @pytest.mark.parametrize("shape", [(0, 5, 2), (3, 0, 2), (3, 5, 0)])
    def test_an_array_without_values_is_refused(self, shape: tuple[int, ...], tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"data.npz is empty"):
            read(self.save(tmp_path, X=np.ones(shape)))

    @pytest.mark.parametrize(("name", "value"), [("y", [1, 2, 3]), ("groups", [[1], [2]]), ("lengths", [1])])
    def test_columns_must_have_one_value_a_sequence(self, name: str, value: list[Any], tmp_path: Path) -> None:
        with pytest.raises(DataError, match=rf"{name} must be of shape \(2,\), one a sequence, got"):
            read(self.save(tmp_path, X=np.ones((2, 3)), **{name: value}))

    def test_objects_are_never_unpickled_and_the_way_out_is_named(self, tmp_path: Path) -> None:
        labels = np.array(["a", "b"], dtype=object)
        with pytest.raises(DataError, match="never loaded: save labels as a str array"):
            read(self.save(tmp_path, X=np.ones((2, 3)), y=labels))

    @pytest.mark.parametrize(
        ("labels", "classes"),
        [
            (np.array([True, False]), ("False", "True")),
            (np.array([b"x", b"y"]), ("x", "y")),
            (np.array([0.5, 1.0]), ("0.5", "1")),
            (np.array([" a", "b "]), ("a", "b")),
            (np.array(["3", "nan", "10", "2", "0"]), ("0", "10", "2", "3", "nan")),
        ],
    )
    def test_labels_of_any_type_are_named(self, labels: Any, classes: tuple[str, ...], tmp_path: Path) -> None:
        assert read(self.save(tmp_path, X=np.ones((len(labels), 3)), y=labels)).classes == classes

    def test_a_missing_label_among_others_is_refused_and_all_missing_are_none(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"sequence 1 has no label: label every sequence or none"):
            read(self.save(tmp_path, X=np.ones((2, 3)), y=[1.0, NAN]))
        assert read(self.save(tmp_path, X=np.ones((2, 3)), y=[NAN, NAN])).labels is None

    def test_a_missing_group_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"sequence 0 has no group"):
            read(self.save(tmp_path, X=np.ones((2, 3)), groups=[NAN, 1]))

    @pytest.mark.parametrize(("name", "meant"), [("labels", "y"), ("Y", "y"), ("length", "lengths"), ("x", "X")])
    def test_a_misnamed_array_is_refused(self, name: str, meant: str, tmp_path: Path) -> None:
        arrays = {"X": np.ones((2, 3)), name: np.ones(2)} if name != "x" else {"x": np.ones((2, 3))}
        with pytest.raises(DataError, match=f"unknown array '{name}'; if it is '{meant}', call it so"):
            read(self.save(tmp_path, **arrays))

    def test_a_file_without_values_says_what_it_has(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="has no array 'X'; it has values"):
            read(self.save(tmp_path, values=np.ones((2, 3))))

    def test_a_damaged_file_is_refused(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, X=np.random.default_rng(0).random((50, 50)))
        content = bytearray(path.read_bytes())
        content[5000] ^= 255
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged: Bad CRC"):
            read(path)
        np.savez_compressed(path, X=np.arange(5000.0)[:, None])
        content = bytearray(path.read_bytes())
        content[100:300] = bytes(200)
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged: Error -3"):
            read(path)


class TestLongForm:
    def test_rows_may_stand_in_any_order(self, tmp_path: Path) -> None:
        path = text(tmp_path, "a.csv", "id,step,x,label", "b,2,5,q", "a,10,2,p", "b,1,4,q", "a,9,1,p")
        data = read(path)
        assert data.ids == ("b", "a")
        assert data.values[:, :, 0].tolist() == [[4, 5], [1, 2]]

    @pytest.mark.parametrize(
        ("early", "late"),
        [
            ("1700000000000000001", "1700000000000000002"),  # nanoseconds: beyond a float's whole numbers
            ("0.5", "10"),
            ("2024-01-09", "2024-01-10"),
            ("2024-01-01T09:00:00Z", "2024-01-01T10:00:00Z"),
            ("2024-01-01 09:00:00.5", "2024-01-01 10:00"),
        ],
    )
    def test_steps_are_numbers_or_times(self, early: str, late: str, tmp_path: Path) -> None:
        data = read(text(tmp_path, "a.csv", "id,step,x", f"a,{late},2", f"a,{early},1"))
        assert data.values[0, :, 0].tolist() == [1, 2]

    def test_parquet_steps_may_be_timestamps_and_text_columns_categories(self, tmp_path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        steps = np.array(["2024-01-02", "2024-01-01"], dtype="datetime64[ns]")
        table = pa.table(
            {
                "id": pa.array(["a", "a"]).dictionary_encode(),
                "step": steps,
                "x": pa.array([True, False]),
                "label": pa.array([1.0, 1.0]),
            }
        )
        pq.write_table(table, tmp_path / "a.parquet")
        data = read(tmp_path / "a.parquet")
        assert data.values[0, :, 0].tolist() == [0, 1]
        assert data.classes == ("1",)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (["a,0,1,p", "a,0,2,p"], "row 3: sequence 'a' has step 0 a second time"),
            (["a,0,1,p", "a,,2,p"], "row 3 has no step"),
            (["a,0,1,p", "a,soon,2,p"], "steps must be numbers or ISO times"),
            (["a,2024-01-01T00:00+01:00,1,p"], "ISO times without an offset"),
            (["a,0,1,p", ",1,2,p"], "row 3 has no id"),
            (["a,0,1,p", "a,1,2,q"], "row 3: label of sequence 'a' changes to 'q'; a sequence has one label"),
            (["a,0,1,p", "a,1,2,"], "row 3: label of sequence 'a' changes to None"),
            (["a,0,1,p", "b,0,2,"], "sequence b has no label"),
            (["a,0,1,p", "a,1,many,p"], "row 3, column 'x': 'many' is not a number"),
            (["a,0,1,p", "a,1,2"], "row 3 has 3 cells, the header 4"),
            (["a,0,1,p", "", "a,1,2,p,9"], "row 4 has 5 cells, the header 4"),
        ],
    )
    def test_faults_name_the_row(self, rows: list[str], message: str, tmp_path: Path) -> None:
        path = text(tmp_path, "a.csv", "id,step,x,label", *rows)
        with pytest.raises(DataError) as caught:
            read(path)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)

    def test_columns_may_have_other_names(self, tmp_path: Path) -> None:
        path = text(tmp_path, "a.csv", "subject,t,x,class,site", "s1,0,1,p,A", "s2,0,2,q,A")
        data = read(path, id="subject", step="t", label="class", group="site")
        assert data.classes == ("p", "q")
        assert data.groups is not None
        assert data.groups.tolist() == [0, 0]
        assert data.features == ("x",)

    @pytest.mark.parametrize("role", ["id", "step", "group", "label"])
    def test_an_unknown_column_lists_the_known_ones(self, role: str, tmp_path: Path) -> None:
        path = text(tmp_path, "a.csv", "id,step,x,label,group", "a,0,1,p,g")
        named: Any = {role: "subject"}
        with pytest.raises(DataError, match=f"has no {role} column 'subject'; its columns are id, step, x, label"):
            read(path, labeled=True, **named)

    def test_prediction_data_needs_neither_label_nor_group_column(self, tmp_path: Path) -> None:
        path = text(tmp_path, "a.csv", "id,step,x", "a,0,1")
        assert read(path, label="class", group="site", labeled=False).n == 1

    def test_features_are_found_by_name_whatever_their_order(self, tmp_path: Path) -> None:
        path = text(tmp_path, "a.csv", "note,y,x,id,step", "hello,2,1,a,0")
        data = read(path, features=("x", "y"))
        assert data.features == ("x", "y")
        assert data.values[0, 0].tolist() == [1, 2]

    def test_parquet_without_id_or_step_is_refused(self, tmp_path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"t0": [1.0], "label": ["a"]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match="long form needs columns 'id' and 'step'; its columns are t0, label"):
            read(tmp_path / "a.parquet")

    def test_parquet_columns_of_text_are_refused_by_name(self, tmp_path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"id": ["a"], "step": [0], "x": ["many"]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match="column 'x' must hold numbers"):
            read(tmp_path / "a.parquet")

    def test_without_pyarrow_the_extra_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.parquet").touch()
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(DataError, match=r"pip install 'hpo\[parquet\]'"):
            read(tmp_path / "a.parquet")


class TestCsv:
    def test_ids_and_groups_of_the_wide_form_are_read(self, tmp_path: Path) -> None:
        data = read(text(tmp_path, "a.csv", "id,0,1,label,group", "p,1,2,a,g", "q,3,,b,g"))
        assert data.ids == ("p", "q")
        assert data.lengths.tolist() == [2, 1]
        assert data.groups is not None
        assert data.groups.tolist() == [0, 0]

    @pytest.mark.parametrize("missing", ["", " ", "NaN", "nan", "NA", "?", "null"])
    def test_missing_values_are_written_in_many_ways(self, missing: str, tmp_path: Path) -> None:
        data = read(text(tmp_path, "a.csv", "t0,t1,t2,label", f"1,{missing},3,a"))
        assert data.values[0, :, 0].tolist() == [1, 2, 3]
        assert data.filled == 1

    def test_quotes_spaces_blank_lines_and_a_byte_order_mark_are_understood(self, tmp_path: Path) -> None:
        path = text(tmp_path, "a.csv", '\ufeffid, t0, t1, "label"', 'p, 1, 2, "a, b"', "", "q, 3, 4, c")
        data = read(path)
        assert data.ids == ("p", "q")
        assert data.classes == ("a, b", "c")
        assert data.values[:, :, 0].tolist() == [[1, 2], [3, 4]]

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ("0.5,1.5,2.5", "the first row must name every column"),
            ("7,3,5", "the first row must name every column"),
            ("t0,t0,label", "the first row must name every column, each differently; its columns are t0, t0, label"),
            (",0,label", "the first row must name every column"),
            ("step,x,label", "long form needs columns 'id' and 'step'"),
            ("subject,time,label", "in wide form the names of the steps end in numbers"),
            ("id,step,label", "has no feature column"),
        ],
    )
    def test_a_header_that_fits_no_form_is_refused(self, header: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=message):
            read(text(tmp_path, "a.csv", header, "1,2,3"))

    def test_repeated_ids_in_wide_form_point_to_the_long_form(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="ids repeat as in long form: name its step column too"):
            read(text(tmp_path, "a.csv", "id,t1,x1,label", "a,0,5,p", "a,1,6,p"))

    def test_a_header_alone_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is empty: it has a header only"):
            read(text(tmp_path, "a.csv", "id,step,x"))

    def test_text_that_is_not_utf8_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_bytes("t0,label\n1,größer\n".encode("latin-1"))
        with pytest.raises(DataError, match="is not a text file in UTF-8"):
            read(tmp_path / "a.csv")

    def test_files_longer_than_a_chunk_are_read_whole(self, tmp_path: Path) -> None:
        rows = [f"{i // 3},{i % 3},{i},{i // 3 % 2}" for i in range(3300)]
        data = read(text(tmp_path, "a.csv", "id,step,x,label", *rows))
        np.testing.assert_array_equal(data.values.ravel(), np.arange(3300))
        with pytest.raises(DataError, match="row 2502, column 'x': 'no' is not a number"):
            read(text(tmp_path, "b.csv", "id,step,x,label", *rows[:2500], "x,1,no,1"))


class TestTs:
    def write(self, folder: Path, *rows: str, header: str = "@classLabel true a b") -> Path:
        return text(folder, "a.ts", "@problemName any", *header.split("\n"), "@data", *rows)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (["1,2:3,4:a", "1,2:b"], "line 5 has 1 features, expected 2"),
            (["1,2:3:a"], "line 4: every feature of a sequence needs the same steps"),
            (["a"], "line 4: every feature of a sequence needs"),
            (["1,x:a"], "line 4: values must be numbers separated by commas: .*'x'"),
            (["1,2:c"], "line 4: label 'c' is not one of @classLabel"),
            (["1:a", "2:?"], "line 5 has no label"),
        ],
    )
    def test_faults_name_the_line(self, rows: list[str], message: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=message):
            read(self.write(tmp_path, *rows))

    @pytest.mark.parametrize("field", ["timestamps", "targetlabel"])
    def test_what_is_not_supported_is_said(self, field: str, tmp_path: Path) -> None:
        header = f"@{'timeStamps' if field == 'timestamps' else field} True"
        with pytest.raises(DataError, match=f"@{field} true is not supported"):
            read(self.write(tmp_path, "(0,1),(1,2):1.5", header=header))

    def test_the_header_and_the_data_must_have_the_same_features(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="line 6 has 2 features, expected 3"):
            read(self.write(tmp_path, "1:2:a", header="@univariate false\n@dimensions 3\n@classLabel true a"))
        with pytest.raises(DataError, match="line 5 has 2 features, expected 1"):
            read(self.write(tmp_path, "1:2:a", header="@univariate true\n@classLabel true a"))

    def test_unknown_labels_make_it_unlabeled(self, tmp_path: Path) -> None:
        assert read(self.write(tmp_path, "1:?", "2:?")).labels is None

    def test_labels_are_compared_as_numbers_with_those_of_the_header(self, tmp_path: Path) -> None:
        assert read(self.write(tmp_path, "1:1", "2:2.0", header="@classLabel true 1.0 2.0")).classes == ("1", "2")

    def test_words_before_the_data_and_between_are_passed_over(self, tmp_path: Path) -> None:
        path = text(tmp_path, "a.ts", "% any: words", "@classlabel true a", "@DATA", "# more", "", "1,2:a")
        assert read(path).values[0, :, 0].tolist() == [1, 2]

    def test_a_description_in_another_encoding_is_passed_over(self, tmp_path: Path) -> None:
        content = "# größer\r\n@classLabel true a\r\n@data\r\n1,2:a\r\n"
        (tmp_path / "a.ts").write_bytes(content.encode("latin-1"))
        assert read(tmp_path / "a.ts").classes == ("a",)

    def test_other_text_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"is no \.ts file: it has no line @data"):
            read(text(tmp_path, "a.ts", "const a = 1;"))


# ------------------------------------------------------------------ arrays


def test_lists_of_arrays_are_ragged_sequences() -> None:
    data = from_arrays([np.ones((2, 3)), np.ones((4, 3))], ["a", "b"], groups=["g", "h"], ids=["p", "q"])
    assert data.values.shape == (2, 4, 3)
    assert data.lengths.tolist() == [2, 4]
    assert data.ids == ("p", "q")
    assert from_arrays([[1, 2], [3]]).values[:, :, 0].tolist() == [[1, 2], [3, 0]]


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ([np.ones((2, 3)), np.ones((2, 2))], "the data, sequence 1 has 2 features, the first sequence has 3"),
        ([np.ones((2, 3)), np.ones((0, 3))], "the data, sequence 1 has length 0"),
        ([np.ones(2), np.array("x")], "the data, sequence 1: a sequence must be numbers"),
        ([], "the data is empty"),
    ],
)
def test_lists_that_are_no_sequences_are_refused(X: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_arrays(X)


def test_the_callers_array_is_left_as_it_was() -> None:
    X = np.array([[1, NAN, 3]], dtype=np.float32)
    assert from_arrays(X).values[0, 1, 0] == 2
    assert np.isnan(X[0, 1])


def test_taken_sequences_keep_their_order_classes_and_steps() -> None:
    data = from_arrays([[1.0], [2.0, 3.0], [4.0]], ["a", "b", "c"], groups=[7, 8, 7])
    part = data.take([2, 0])
    assert part.values[:, :, 0].tolist() == [[4, 0], [1, 0]]
    assert part.labels is not None
    assert part.labels.tolist() == [2, 0]
    assert part.groups is not None
    assert part.groups.tolist() == [0, 0]
    assert (part.ids, part.classes) == (("2", "0"), ("a", "b", "c"))
    assert data.take(np.array([False, True, False])).ids == ("1",)
    assert data.take(i for i in range(0)).n == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "file.csv has no labels"),
        (["a", "a", "a"], "file.csv has one class only, 'a': a classifier needs two or more"),
        ([0.1, 0.2, 0.3], "file.csv has another label for each of its 3 sequences"),
    ],
)
def test_data_that_no_classifier_can_learn_from_is_refused(labels: list[Any] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_trainable(from_arrays(np.ones((3, 2)), labels), "file.csv")


def test_two_classes_can_be_trained() -> None:
    check_trainable(from_arrays(np.ones((3, 2)), ["a", "b", "a"]))


# ------------------------------------------------------------------ the canonical file


@settings(max_examples=40, deadline=None)
@given(contents())
def test_saving_and_loading_keeps_everything(content: Content) -> None:
    data = read_all(content, ["npz"])["npz"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        save(data, path)
        assert [found.name for found in Path(folder).iterdir()] == ["data"]
        again = load(path)
        assert differences(data, again) == []
        assert hashlib.sha256(path.read_bytes()).hexdigest() == fingerprint(data) == fingerprint(again)


@settings(max_examples=40, deadline=None)
@given(contents(), st.data())
def test_the_fingerprint_changes_with_the_content_and_only_then(content: Content, drawn: st.DataObject) -> None:
    data, same = read_all(content, ["npz"])["npz"], read_all(content, ["long"])["long"]
    assert fingerprint(data) == fingerprint(same)
    values = data.values.copy()
    at = tuple(drawn.draw(st.integers(0, size - 1)) for size in values.shape)
    values[at] = np.nextafter(values[at], np.float32(np.inf))
    others = [
        replace(data, values=values),
        replace(data, lengths=data.lengths + 1),
        replace(data, classes=(*data.classes, "another")),
        replace(data, ids=("another", *data.ids[1:])),
        replace(data, features=("another", *data.features[1:])),
        replace(data, filled=data.filled + 1),
        replace(data, groups=np.arange(data.n) + 10),
        replace(data, labels=np.arange(data.n) + 20),
    ]
    assert len({fingerprint(other) for other in [data, *others]}) == len(others) + 1


def test_a_loaded_file_is_mapped_and_writing_to_it_stays_in_memory(tmp_path: Path) -> None:
    save(from_arrays(np.ones((2, 3)), ["a", "b"]), tmp_path / "data")
    before = (tmp_path / "data").read_bytes()
    data = load(tmp_path / "data")
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path / "data") in maps.read_text()
    data.values[:] = 7
    assert (tmp_path / "data").read_bytes() == before


def test_a_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    whole = to_bytes(from_arrays(np.ones((2, 3)), ["a", "b"]))
    for content in (b"", whole[:4], whole[:50], whole[:-1], b"\xff" * 100, b"\x02" + bytes(7) + b"{}"):
        (tmp_path / "data").write_bytes(content)
        with pytest.raises(DataError, match="data is not a whole data set file"):
            load(tmp_path / "data")


def test_the_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    save(from_arrays(np.ones((2, 3)), ["a", "b"]), tmp_path / "data")
    assert sorted(load_file(tmp_path / "data")) == ["labels", "lengths", "values"]


def test_failing_to_write_leaves_the_old_file(tmp_path: Path) -> None:
    data = from_arrays(np.ones((2, 3)))
    save(data, tmp_path / "data")
    before = (tmp_path / "data").read_bytes()
    with pytest.raises(TypeError):
        save(replace(data, ids=(object(), "b")), tmp_path / "data")  # type: ignore[arg-type]
    assert (tmp_path / "data").read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["data"]


# ------------------------------------------------------------------ the data that ships


@pytest.mark.parametrize(
    ("name", "n_train", "n_test", "steps", "F", "classes"),
    [("ItalyPowerDemand", 67, 1029, (24, 24), 1, 2), ("JapaneseVowels", 270, 370, (7, 29), 12, 9)],
)
def test_the_example_data_is_complete(
    name: str, n_train: int, n_test: int, steps: tuple[int, int], F: int, classes: int
) -> None:
    train = read(EXAMPLES / f"{name}_TRAIN.ts", labeled=True)
    test = read(EXAMPLES / f"{name}_TEST.ts", labeled=True, classes=train.classes)
    lengths = np.concatenate([train.lengths, test.lengths])
    assert (train.n, test.n) == (n_train, n_test)
    assert (lengths.min(), lengths.max()) == steps
    assert train.n_features == test.n_features == F
    assert train.classes == tuple(str(i + 1) for i in range(classes))
    assert train.filled == test.filled == 0
    check_trainable(train)


def test_the_readers_are_those_of_the_known_suffixes() -> None:
    assert list(READERS) == [".npz", ".csv", ".parquet", ".ts"]


def test_the_module_is_light() -> None:
    """Workers and the command line import it: no torch, scikit-learn or pyarrow."""
    import subprocess

    code = (
        "import hpo.models.data.canonical, hpo.models.data.readers, hpo.models.data.splits, sys; "
        "print([m for m in ('torch', 'sklearn', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
