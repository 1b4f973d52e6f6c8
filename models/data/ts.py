"""The UCR/UEA text format: one sequence a line, features separated by ':', the label last, '?' missing.

https://www.aeon-toolkit.org/en/stable/api_reference/data_format.html
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpo.models.data.sequences import MISSING, DataError, Raw, concatenated, name_of, names_of


def read_ts(path: Path) -> Raw:
    """A file of that format, with equal steps and without timestamps or target values. Raises DataError."""
    text = path.read_bytes().decode("utf-8-sig", errors="backslashreplace")  # descriptions may be Latin-1
    numbered = ((i, line.strip()) for i, line in enumerate(text.split("\n"), 1))
    lines = [(i, line) for i, line in numbered if line and not line.startswith("#")]
    start = next((k for k, (_, line) in enumerate(lines) if line.lower() == "@data"), None)
    if lines and start is None:
        raise DataError(f"{path} is no .ts file: it has no line @data")
    fields = [line.split() for _, line in lines[:start] if line.startswith("@")]
    header = {key.lower(): words for key, *words in fields}
    on = {key for key, words in header.items() if words[:1] and words[0].lower() == "true"}
    for key in on & {"@timestamps", "@targetlabel"}:
        raise DataError(f"{path}: {key} true is not supported, only values at regular steps with a class")
    classes = set(names_of(header["@classlabel"][1:])) if "@classlabel" in on else None
    n_features = ["1"] if "@univariate" in on else header.get("@dimensions", header.get("@dimension"))
    return _ts_lines(str(path), lines[(start or 0) + 1 :], classes, n_features)


def _ts_lines(
    source: str, lines: list[tuple[int, str]], classes: set[str | None] | None, n_features: list[str] | None
) -> Raw:
    parts: list[NDArray[np.float64]] = []
    labels: list[str | None] = []
    for i, line in lines:
        channels = line.split(":")
        if classes is not None:
            label = channels.pop().strip()
            labels.append(None if label == "?" else label)
            if classes and name_of(labels[-1]) not in {*classes, None}:
                raise DataError(f"{source}, line {i}: label {label!r} is not one of @classLabel")
        parts.append(_ts_values(f"{source}, line {i}", channels))
        n_features = n_features or [str(parts[0].shape[1])]
        if [str(len(channels))] != n_features:
            raise DataError(f"{source}, line {i} has {len(channels)} features, expected {n_features[0]}")
    marks = [i for i, _ in lines]
    return Raw(source, concatenated(parts), labels if classes is not None else None, None, "line", marks)


def _ts_values(at: str, channels: list[str]) -> NDArray[np.float64]:
    """(T, F) of one line's channels."""
    if len({channel.count(",") for channel in channels}) != 1:
        raise DataError(f"{at}: every feature of a sequence needs the same steps; mark missing ones with '?'")
    cells = ",".join(channels).replace(" ", "").split(",")
    try:
        flat = np.array(list(map(MISSING.get, cells, cells)), dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{at}: values must be numbers separated by commas: {error}") from None
    return flat.reshape(len(channels), -1).T
