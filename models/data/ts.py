"""The UCR/UEA text format: one sequence a line, features separated by ':', the label last, '?' missing.

https://www.aeon-toolkit.org/en/stable/api_reference/data_format.html
"""

from __future__ import annotations

import re
from array import array
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpo.models.data.sequences import MISSING, DataError, Raw, name_of, names_of, pad, warn
from hpo.models.data.sizes import check_padding
from hpo.models.data.text import lines_of, open_bytes

Lines = list[tuple[int, str]]  # with their numbers, from 1

ARFF = "is an ARFF file, which is not read: save it as .ts (aeon.datasets.save_to_ts_file) or as wide csv"
_KEYS = ("@timestamps", "@univariate", "@dimensions", "@dimension", "@classlabel", "@targetlabel")  # those that count


def read_ts(path: Path) -> Raw:
    """A file of that format, with equal steps and without timestamps or target values. Raises DataError."""
    with open_bytes(path) as file:
        text = file.read().decode("utf-8-sig", errors="surrogateescape")  # descriptions may be Latin-1
    numbered = ((i, line.strip()) for i, line in enumerate(lines_of(text), 1))
    lines = [(i, line) for i, line in numbered if line and not line.startswith("#")]
    start = next((k for k, (_, line) in enumerate(lines) if line.lower() == "@data"), None)
    if any(line.lower().startswith("@attribute") for _, line in lines[:start]):
        raise DataError(f"{path} {ARFF}")
    if lines and start is None:
        raise DataError(f"{path} is no .ts file: it has no line @data")
    header = _header(str(path), lines[:start])
    on = {key for key, words in header.items() if words[:1] and words[0].lower() == "true"}
    for key in on & {"@timestamps", "@targetlabel"}:
        raise DataError(f"{path}: {key} true is not supported, only values at regular steps with a class")
    if lines and not header.keys() & {"@classlabel", "@targetlabel"}:
        rule = "write '@classLabel true' with the classes, or '@classLabel false' where the lines have no label"
        raise DataError(f"{path} has no line @classLabel: {rule}")
    classes = set(names_of(header["@classlabel"][1:])) if "@classlabel" in on else None
    n_features = ["1"] if "@univariate" in on else header.get("@dimensions", header.get("@dimension"))
    data = lines[(start or 0) + 1 :]
    if not text.isascii():
        _check_encoding(str(path), [*(line for line in lines[:start] if line[1].lower().startswith("@class")), *data])
    raw = _ts_lines(path, data, classes, n_features)
    if "@equallength" in on:
        _say_unequal(raw)
    return raw


def _say_unequal(raw: Raw) -> None:
    """Warn of a sequence that ends early where the header says that none does: a lost value shifts those behind it."""
    ends = np.isnan(raw.values[:, -1:]).all(axis=(1, 2))  # padding, or missing throughout
    for i in np.flatnonzero(ends)[:1].tolist():
        rule = "ends before others, though @equalLength is true"
        warn(f"{raw.at(i)} {rule}: it is read as a shorter sequence")


def _header(source: str, lines: Lines) -> dict[str, list[str]]:
    """The words behind each key, in small letters."""
    header = {}
    for i, line in lines:
        key, *words = line.split() if line.startswith("@") else [""]
        known = key.lower()
        for meant in get_close_matches(known, _KEYS, 1, 0.85) if known not in _KEYS else ():
            raise DataError(f"{source}, line {i}: unknown {key}; is {meant.replace('label', 'Label')} meant?")
        header[known] = words
    return header


def _check_encoding(source: str, lines: Lines) -> None:
    """Raise DataError for a line that is not in UTF-8."""
    for i, line in lines:
        if bad := re.search(r"[\udc80-\udcff]", line):
            byte = ord(bad[0]) - 0xDC00
            raise DataError(f"{source}, line {i} is not text in UTF-8: byte 0x{byte:02x}; save the file in UTF-8")


def _ts_lines(path: Path, lines: Lines, classes: set[str | None] | None, n_features: list[str] | None) -> Raw:
    values, lengths = array("d"), []  # of all lines, one after another
    labels: list[str | None] = []
    source = str(path)
    for i, line in lines:
        channels = line.split(":")
        if classes is not None:
            labels.append(channels.pop().strip())
            if classes and name_of(labels[-1]) not in {*classes, None}:
                raise DataError(f"{source}, line {i}: label {labels[-1]!r} is not one of @classLabel")
        part = _ts_values(f"{source}, line {i}", channels)
        values.frombytes(part.tobytes())
        lengths.append(len(part))
        n_features = n_features or [str(len(channels))]
        if [str(len(channels))] != n_features:
            raise DataError(f"{source}, line {i} has {len(channels)} features, expected {n_features[0]}")
    check_padding(path, len(lengths), max(lengths, default=0), len(values) // max(sum(lengths), 1))
    flat = np.frombuffer(values).reshape(sum(lengths), -1) if lengths else np.empty((0, 0))
    marks = [i for i, _ in lines]
    return Raw(
        source,
        pad(flat, np.array(lengths, dtype=np.int64)),
        labels if classes is not None else None,
        None,
        "line",
        marks,
    )


def _ts_values(at: str, channels: list[str]) -> NDArray[np.float64]:
    """(T, F) of one line's channels."""
    if len({channel.count(",") for channel in channels}) != 1:
        raise DataError(f"{at}: every feature of a sequence needs the same steps; mark missing ones with '?'")
    cells = [cell.strip() for cell in ",".join(channels).split(",")]
    try:
        if any("_" in channel for channel in channels):
            raise ValueError(f"could not convert {next(cell for cell in cells if '_' in cell)!r}")
        flat = np.array(list(map(MISSING.get, cells, cells)), dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{at}: values must be numbers separated by commas: {error}") from None
    return flat.reshape(len(channels), -1).T
