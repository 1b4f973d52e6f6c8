"""What a client process does that is killed: kept apart, so that a forked one has nothing else to import."""

from __future__ import annotations

from pathlib import Path

import hpo.client


def submit(url: str, token: str, study: Path) -> None:
    """Send the data, open the study, and that is all."""
    with hpo.client.connect(url, token) as client:
        client.submit(study)
