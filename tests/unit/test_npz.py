"""npz files, and the arrays in them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hpo.models.data.canonical import fingerprint
from hpo.models.data.readers import read
from hpo.models.data.sequences import DataError, from_arrays

NAN = float("nan")


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
            (np.array(["3", "x", "10", "2", "0"]), ("0", "10", "2", "3", "x")),
            (np.array([2**63, 2**64 - 1], dtype=np.uint64), ("9223372036854775808", "18446744073709551615")),
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


class TestNothingIsGuessed:
    """Each from a report of another reader."""

    @pytest.mark.parametrize("name", ["mask", "time", "ids"])
    def test_an_array_that_is_not_read_is_refused(self, name: str, tmp_path: Path) -> None:
        """numpy/numpy/issues/26669"""
        arrays: dict[str, Any] = {"X": np.ones((2, 3)), name: np.ones((2, 3))}
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(DataError, match=f"unknown array '{name}': .*lengths say how many steps are valid"):
            read(tmp_path / "a.npz")

    def test_labels_that_are_no_text_are_refused_with_their_place(self, tmp_path: Path) -> None:
        """PIC-IRIS/PH5/issues/536"""
        np.savez(tmp_path / "a.npz", X=np.ones((2, 3)), y=np.array([b"ok", "été".encode("latin-1")]))
        with pytest.raises(DataError, match=r"a\.npz, sequence 1: b'\\xe9t\\xe9' is not text in UTF-8; .*str array"):
            read(tmp_path / "a.npz")

    def test_another_way_to_zip_is_named(self, tmp_path: Path) -> None:
        """ImageMarkup/isic-challenge-scoring/pull/122"""
        np.savez(tmp_path / "a.npz", X=np.ones((2, 3)))
        content = bytearray((tmp_path / "a.npz").read_bytes())
        central = content.index(b"PK\x01\x02")
        content[8], content[central + 10] = 9, 9  # the method of the one array: deflate64
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"zipped in a way that is not read .*: write it with numpy\.savez"):
            read(tmp_path / "a.npz")

    @pytest.mark.parametrize("label", ["a\0b", "a\ud800"])
    def test_a_name_that_the_database_cannot_keep_is_refused_with_its_place(self, label: str, tmp_path: Path) -> None:
        """turbot/steampipe/issues/292"""
        np.savez(tmp_path / "a.npz", X=np.ones((2, 3)), y=np.array(["c", label]))
        with pytest.raises(DataError, match=r"a\.npz, sequence 1: the name of a class must hold neither a NUL nor"):
            read(tmp_path / "a.npz")

    def test_shorter_sequences_as_objects_are_told_the_way_out(self, tmp_path: Path) -> None:
        """StigTerrebonne/AIS-LSTM/issues/3"""
        X = np.empty(2, dtype=object)
        X[0], X[1] = np.ones(2), np.ones(3)
        np.savez(tmp_path / "a.npz", X=X)
        with pytest.raises(DataError, match="shorter sequences with NaN or zeros behind them and `lengths`"):
            read(tmp_path / "a.npz")


class TestInMemory:
    def test_a_dict_of_arrays_is_read_like_an_npz_file(self, tmp_path: Path) -> None:
        arrays: dict[str, Any] = {"X": np.arange(6.0).reshape(2, 3), "y": ["a", "b"], "lengths": [3, 2]}
        np.savez(tmp_path / "a.npz", **arrays)
        assert fingerprint(read(arrays)) == fingerprint(read(tmp_path / "a.npz"))
        with pytest.raises(DataError, match="the data: unknown array 'mask'"):
            read({**arrays, "mask": np.ones((2, 3))})

    def test_an_array_or_a_list_of_arrays_is_read(self) -> None:
        assert read(np.ones((2, 3))).values.shape == (2, 3, 1)
        assert read([np.ones((2, 3)), np.ones((4, 3))]).lengths.tolist() == [2, 4]

    def test_masked_values_are_missing(self) -> None:
        """numpy/numpy/issues/26669"""
        X = np.ma.masked_greater(np.array([[1.0, 99.0, 3.0], [4.0, 5.0, 99.0]]), 9)
        for data in (from_arrays(X), from_arrays(list(X)), read({"X": X})):
            assert data.values[:, :, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
            assert (data.lengths.tolist(), data.filled) == ([3, 2], 1)
        with pytest.raises(DataError, match="sequence 1 has no label"):
            from_arrays(np.ones((2, 3)), np.ma.masked_greater(np.array([1, 99]), 9))

    def test_tensors_are_arrays_whatever_their_type(self) -> None:
        """timeseriesAI/tsai/issues/348"""
        torch = pytest.importorskip("torch")
        for tensor in (torch.ones(3, 4, 2, requires_grad=True), torch.ones(3, 4, 2, dtype=torch.bfloat16)):
            assert from_arrays(tensor).values.tolist() == np.ones((3, 4, 2)).tolist()
            assert from_arrays(list(tensor), list(torch.arange(3))).classes == ("0", "1", "2")
        with pytest.raises(DataError, match="the data: X is not an array of numbers"):
            from_arrays(torch.ones(3, 4).to_sparse())

    def test_ragged_lists_name_the_sequence(self) -> None:
        """sktime/sktime/issues/3536"""
        with pytest.raises(DataError, match="the data, sequence 1 is not an array of numbers"):
            from_arrays([[[1, 2], [3, 4]], [[1, 2], [3]]])
        with pytest.raises(DataError, match=r"sequence 0: \[1\] is neither text nor a number"):
            from_arrays(np.ones((2, 3)), y=np.array([[1], None], dtype=object))

    def test_a_sequence_without_a_name_among_named_ones_is_refused(self) -> None:
        with pytest.raises(DataError, match="the data, sequence 1 has no id"):
            from_arrays(np.ones((2, 3)), ids=["a", None])
