"""The .ts format."""

from pathlib import Path

import pytest

from hpo.models.data.readers import read
from hpo.models.data.sequences import DataError


def text(folder: Path, name: str, *lines: str) -> Path:
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


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


class TestNothingIsGuessed:
    """Each from a report of another reader."""

    def test_a_label_nan_is_missing(self, tmp_path: Path) -> None:
        """aeon-toolkit/aeon/pull/887"""
        with pytest.raises(DataError, match=r"a\.ts, line 3 has no label \('NaN' is a missing one\)"):
            read(text(tmp_path, "a.ts", "@classLabel true", "@data", "1,2:NaN", "3,4:b"))

    def test_without_a_line_of_classes_the_label_is_no_feature(self, tmp_path: Path) -> None:
        """gzerveas/mvts_transformer/pull/15"""
        with pytest.raises(DataError, match="has no line @classLabel: write '@classLabel true' with the classes"):
            read(text(tmp_path, "a.ts", "@problemName any", "@data", "3:1", "6:2"))

    @pytest.mark.parametrize("line", ["@class_label true a", "@classLabels true a", "@timestamp true"])
    def test_a_misspelt_key_is_named(self, line: str, tmp_path: Path) -> None:
        """sktime/sktime/pull/3303"""
        key = line.split()[0]
        with pytest.raises(DataError, match=rf"line 2: unknown {key}; is @(classLabel|timestamps) meant\?"):
            read(text(tmp_path, "a.ts", "@univariate true", line, "@data", "1,2:a"))

    @pytest.mark.parametrize(("class_line", "row"), [("@classLabel true", "1:été"), ("@classLabel true été", "1:a")])
    def test_classes_in_another_encoding_are_refused(self, class_line: str, row: str, tmp_path: Path) -> None:
        """VertNet/bels/issues/39"""
        line = 3 if "é" in row else 1
        (tmp_path / "a.ts").write_bytes(f"{class_line}\n@data\n{row}\n".encode("latin-1"))
        with pytest.raises(DataError, match=rf"a\.ts, line {line} is not text in UTF-8: byte 0xe9"):
            read(tmp_path / "a.ts")

    @pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
    def test_lines_end_as_any_system_ends_them(self, end: str, tmp_path: Path) -> None:
        """biolab/orange3/issues/7000"""
        lines = ["# any", "@classLabel true a b", "@data", "1,2:a", "", "3,4:b"]
        (tmp_path / "a.ts").write_bytes(end.join(lines).encode())
        assert read(tmp_path / "a.ts").values[:, :, 0].tolist() == [[1, 2], [3, 4]]

    def test_an_arff_file_is_named_as_one(self, tmp_path: Path) -> None:
        """tslearn-team/tslearn/pull/242"""
        lines = ["@relation p", "@attribute att0 numeric", "@attribute target {1,2}", "", "@data", "1,1"]
        with pytest.raises(DataError, match=r"is an ARFF file, which is not read: save it as \.ts"):
            read(text(tmp_path, "a.ts", *lines))

    @pytest.mark.parametrize("cells", ["12 15 17", "1_5"])
    def test_what_is_not_separated_by_commas_is_no_number(self, cells: str, tmp_path: Path) -> None:
        """antonycourtney/tad/issues/139"""
        with pytest.raises(DataError, match=f"line 3: values must be numbers separated by commas: .*'{cells}'"):
            read(text(tmp_path, "a.ts", "@classLabel true a", "@data", f"{cells}:a"))
        assert read(text(tmp_path, "b.ts", "@classLabel true a", "@data", " 1 , 2 : a ")).steps == 2

    def test_a_sequence_that_is_shorter_than_the_header_says_is_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """aeon-toolkit/aeon/issues/853"""
        header = ["@equalLength true", "@classLabel true a b", "@data"]
        assert read(text(tmp_path, "a.ts", *header, "1,2,3:a", "4,?,6:b")).filled == 1
        assert caplog.text == ""
        assert read(text(tmp_path, "b.ts", *header, "1,2,3:a", "4,6:b")).lengths.tolist() == [3, 2]
        assert "b.ts, line 5 ends before others, though @equalLength is true" in caplog.text
