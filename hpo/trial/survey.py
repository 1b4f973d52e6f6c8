"""Asks torch which cards it sees, and whether they work: here, or as a program that prints it as a line of JSON.

python -P -m hpo.trial.survey           all cards, a kernel run on each
python -P -m hpo.trial.survey --list    none run
python -P -m hpo.trial.survey K         a kernel and a captured graph on card K, and on no other one
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch

from hpo.models.device import probe
from hpo.trial.cards import Card, Survey


def survey() -> Survey:
    """Torch's build and the cards that it sees; nothing is run on them."""
    seen = Survey(torch.__version__, _toolkit(), tuple(_architectures()))
    with _warnings() as said:
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            cards = tuple(_card(number) for number in range(count))
        except (RuntimeError, AssertionError) as error:
            return replace(seen, trouble=str(error))
    return replace(seen, cards=cards, trouble=said[0] if said and not cards else None)


def trouble_with(number: int) -> str | None:
    """Why no kernel runs on that card; None where one did. From now on it is the calling thread's card."""
    with _warnings() as said:
        try:
            torch.cuda.set_device(number)  # or a context would be opened on card 0, too
            probe(torch.device("cuda", number))
        except (RuntimeError, MemoryError, AssertionError) as error:
            return str(error).strip() or (said[0] if said else type(error).__name__)
    return None


def graph_trouble_with(number: int) -> str | None:
    """Why a captured graph does not run on that card; None where one did."""
    try:
        with torch.cuda.device(number):
            value = torch.zeros(1, device=torch.device("cuda", number)).add_(1)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                value.add_(1)
            graph.replay()
            found = value.item()
    except (RuntimeError, MemoryError, AssertionError) as error:
        return str(error).strip() or type(error).__name__
    return None if found == 2 else f"a replayed graph gave {found:g} where 2 was right"


def _toolkit() -> str | None:
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    hip = getattr(torch.version, "hip", None)
    return None if hip is None else f"ROCm {hip}"


def _architectures() -> list[str]:
    """Those that torch has kernels for, also where it sees no card."""
    return torch.cuda.get_arch_list() if _toolkit() is not None else []


def _card(number: int) -> Card:
    about = torch.cuda.get_device_properties(number)
    return Card(about.name, f"{about.major}.{about.minor}", about.total_memory)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What torch warns of while the block runs, which is shown nowhere else."""
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: said.append(str(message))
        yield said


def main(arguments: Sequence[str]) -> None:
    """Print the survey."""
    seen = survey()
    cards = list(seen.cards)
    if not arguments:
        cards = [replace(card, trouble=trouble_with(number)) for number, card in enumerate(cards)]
    elif arguments[0] != "--list" and (number := int(arguments[0])) < len(cards):
        trouble = trouble_with(number)
        graph = graph_trouble_with(number) if trouble is None else None
        cards[number] = replace(cards[number], trouble=trouble, graph_trouble=graph)
    sys.stdout.write(json.dumps(asdict(replace(seen, cards=tuple(cards)))) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
