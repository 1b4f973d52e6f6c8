"""Each check of this folder runs on an emulated GPU everywhere, and on a real one where there is one (marked `gpu`).

It needs `hpo.models` alone, so that it runs on a machine that has little more than torch:
`python -m pytest --confcutdir tests/gpu tests/gpu -m gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hpo.models.machine import prepare_process
from tests.gpu.emulation import Driver, installed

GPU = torch.cuda.is_available()
ON_GPU = (pytest.mark.gpu, pytest.mark.xdist_group("gpu"))  # one after the other: some take all of its memory


@pytest.fixture(params=["emulated", *([pytest.param("cuda:0", marks=ON_GPU)] if GPU else [])])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device whose steps are captured: the CPU under an emulated driver, or the first GPU."""
    prepare_process()
    if request.param == "emulated":
        with installed():
            yield "cpu"
    else:
        yield request.param


@pytest.fixture
def driver() -> Iterator[Driver]:
    """The emulated driver alone."""
    prepare_process()
    with installed() as found:
        yield found
