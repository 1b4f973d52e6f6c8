"""Values that float32 cannot tell apart are named, not learnt from in silence.

open-mmlab/mmdetection3d#296 (global coordinates), pytorch#34758: an offset of 1.7e9 (seconds) leaves steps of 128.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpo.models.data.readers import read
from hpo.models.data.sequences import DataError, from_arrays

WAVES = np.random.default_rng(0).normal(size=(12, 9, 2))


def write(path: Path, X: np.ndarray) -> Path:
    np.savez(path, X=X, y=np.arange(len(X)) % 2)
    return path


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1.0, 1e30])
def test_a_scale_alone_loses_nothing(scale: float, caplog: pytest.LogCaptureFixture) -> None:
    from_arrays(WAVES * scale)
    assert not caplog.records


@pytest.mark.parametrize("constant", [0.0, 0.1, 1.7e9 + 1 / 3])
def test_a_constant_feature_loses_nothing(constant: float, caplog: pytest.LogCaptureFixture) -> None:
    X = WAVES.copy()
    X[:, :, 1] = constant
    from_arrays(X)
    assert not caplog.records


def test_training_data_of_which_nothing_is_left_are_an_error_that_names_feature_range_and_way_out(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "far.npz", WAVES * 15 + 1.7e9)
    expected = (
        r"far\.npz: feature 'x0' runs from 1699999[0-9.]+ to 17000000[0-9.]+, where float32 tells steps of 1.3e.02 .*"
    )
    with pytest.raises(
        DataError, match=expected + "feature 'x1' .* nothing of it is left to learn; subtract an offset"
    ):
        read(path, labeled=True)


def test_a_feature_among_others_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    X = WAVES.copy()
    X[:, :, 1] += 1.7e9
    read(write(tmp_path / "far.npz", X), labeled=True)
    assert "far.npz: feature 'x1' runs from" in caplog.text
    assert "'x0'" not in caplog.text


def test_what_is_to_be_predicted_or_tested_is_never_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A few rows of a feature may lie close together that did not in training."""
    path = write(tmp_path / "far.npz", WAVES + 1.7e9)
    read(path, labeled=False)
    read(path, labeled=True, classes=("0", "1"))
    from_arrays(WAVES + 1.7e9)
    assert caplog.text.count("feature 'x0' runs from") == 3


def test_missing_and_padded_values_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    X = WAVES.copy()
    X[0, 3] = np.nan
    X[1, 5:] = np.nan
    from_arrays(X)
    assert not caplog.records
