"""Damaged model folders: only the project's own errors may come of them, in time and in bounded memory.

    python benchmarks/fuzz_models.py [--minutes 10] [--seed 0] [--inputs N] [--keep FOLDER]

Takes a saved model (every pooling and normalisation, of this format and of the earlier one), changes its configuration,
its weights, its checksums or the files themselves, and does what a user does: load, predict, evaluate, show both, write
predictions, export; ONNX and pt2 now and then, as they take seconds. `fuzzing.py` says what a failure is; here also
probabilities that are none, and a name of the folder that reaches the model card or the terminal as an escape code, a
link or HTML. `allowed` is the memory that the docstring of `hpo.models.bundle.bundle.load` states.
`tests/unit/test_fuzz_models.py` runs it for a few seconds and holds the inputs that it has found.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np
from fuzz_study_files import damage_bytes
from fuzzing import MIB, TURNS, Trial

STORED = Path(__file__).resolve().parents[1] / "tests" / "unit" / "stored" / "model"
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"classes": 2, "members": 2, "normalization": "channel"},
    {"pooling": "flatten", "head_size": 3},
    {"pooling": "attention", "bidirectional": True, "layers": 2, "normalization": "sequence"},
    {"pooling": "mean", "patch_length": 2, "sequence_length": 5, "epsilon": 1e-5, "normalization": "channel"},
    {"pooling": "max", "classes": 2, "head_size": 2, "features": 1, "dropout": 0.5},
)
CURVE = {"train_loss": [0.9, 0.5], "value": [0.6, 0.9]}


def allowed(model: Path) -> int:
    """Bytes that loading and using the folder may take, on data of some hundred bytes."""
    return 64 * MIB + 8 * used(model / "model.safetensors") + 64 * used(model / "config.json")


def used(path: Path) -> int:
    """Bytes of the disk, of which a file may have fewer than it is long."""
    return path.lstat().st_blocks * 512 if path.exists() else 0


# ----------------------------------------------------------------------------------------------- the valid folders


def write_models(folder: Path) -> None:
    """A saved model of each kind, one of several configurations, and one of the format before."""
    import torch

    from hpo.models.bundle.bundle import save
    from hpo.models.bundle.config import BundleConfig, Component
    from hpo.models.calibration import calibration_of
    from hpo.models.classifier import Classifier
    from hpo.models.config import ClassifierConfig
    from hpo.models.metrics import measure

    for i, kind in enumerate((*KINDS, KINDS[0])):
        torch.manual_seed(i)
        members = kind.get("members", 1)
        sizes = {"features": 2, "classes": 3, "steps": 6, "hidden_size": 4, **kind}
        classifier = ClassifierConfig(**{name: value for name, value in sizes.items() if name != "members"})
        K = classifier.classes
        probabilities = np.random.default_rng(i).dirichlet(np.ones(K), 40)
        scores, calibration = (find(probabilities, np.arange(40) % K) for find in (measure, calibration_of))
        config = BundleConfig(
            classifier, tuple(f"class {c}" for c in range(K)), ("pulse", "breath")[: classifier.features], "macro_f1",
            members, columns={"label": "y"}, validation=scores, test=scores if i % 2 else None,
            provenance={"study": "hearts", "trial": 3, "packages": {"torch": "2.13"}, "commit": None},
            named=[None, True, False][i % 3], temperature=calibration.temperature if i else 1.0,
            calibration={"validation": calibration.comparison} if i else {},
        )  # fmt: skip
        if i == len(KINDS):
            others = (Component(ClassifierConfig(2, 3, 6, hidden_size=3, pooling="max"), 2, 0.4),)
            config = replace(config, others=others)
        states = []
        for each in config.configurations:
            model = Classifier(each)
            model.fit_normalization(torch.randn(20, 6, each.features), torch.full((20,), 6))
            states.append(model.state_dict())
        save(folder / str(i), states, config, CURVE)
    shutil.copytree(STORED, folder / "earlier")


_valid: list[Path] = []  # of this process, written at the first input


def valid_models() -> list[Path]:
    if not _valid:
        import torch

        torch.set_num_threads(1)
        folder = Path(tempfile.mkdtemp())
        write_models(folder)
        _valid.extend(sorted(folder.iterdir()))
        for each in _valid:  # what is imported at first use is none of an input's memory
            attempt_of(each, Path(tempfile.mkdtemp()), "onnx").run()
    return _valid


# ------------------------------------------------------------------------------------------------------ the changes

NAMES = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\x1b[31mred\x1b[0m", "\x1b]0;title\a", "\x9b31m",
    "\u202eabc", "\u2028", "a\nb", "a\r\n\n# b",
    "[x](javascript:alert(1))", "![x](http://x/y.png)", "\\[x](y)", "`", "``", "```", "```\n<b>", "`<b>`", "a|b",
    "\\", "\\|", "|", "---", "# x", "&lt;b>", "<!--",
    "", " ", "a" * 5000, "é", "e\u0301", "\ud800", "\0", "\u200b", "\ufeff", "$x^2$", "%s", "{}", "x0", "x1",
    "class 0", "class 1", "pulse", "breath", "1", "1.0", "nan", "NA", '"', "'",
    "</code></pre><b>", "https://example.com", "*x*", "_x_", "~~x~~", "\x7f", "\x85", "=1+1", "@x", ":smile:",
    "[bold]x[/bold]", "[red]", "[/]",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 4, 7, 100, 1000, 10**5, 10**6, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**400, 0.0, 1.0, 0.5, -0.5, 2.5, 1e-320, 1e308, float("nan"), float("inf"),
    -float("inf"), True, False, None, "", "x", [], {}, [[]], [{}], [1], ["a"], ["a", "a"], ["a", "b"], ["a", "b",
    "c"], [None, None], [1, 2, 3], {"a": 1}, {"a": {"b": []}}, "last", "mean", "max",
    "attention", "flatten", "none", "channel", "sequence", "log_loss", "auroc", "f1", [[1, 2], [3, 4]], [[1, 0,
    0]] * 3, [0.1, 0.2], {"auroc": 0.5}, {"auroc": [0.1, 0.2]}, {"auroc": "x"}, {"x\x1b": 1},
)  # fmt: skip
KEYS = (
    "classifier", "classes", "features", "metric", "members", "threshold", "columns", "validation", "provenance",
    "temperature", "calibration", "bins", "format", "named", "fill", "hidden_size", "layers", "x",
    "", "label", "sequences", "metrics",
)  # fmt: skip


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


def change_config(rng: random.Random, tree: Any) -> None:
    """One change somewhere, in place."""
    at = tree
    while rng.random() < 0.7 and (
        inner := [
            each for each in (at.values() if isinstance(at, dict) else at) if isinstance(each, dict | list) and each
        ]
    ):
        at = rng.choice(inner)
    keys: list[Any] = list(at) if isinstance(at, dict) else list(range(len(at)))
    key = rng.choice(keys) if keys and rng.random() < 0.9 else rng.choice(KEYS) if isinstance(at, dict) else None
    what = rng.random()
    if key is None:
        at.append(copy.deepcopy(rng.choice(ODD)))
    elif what < 0.35:
        at[key] = copy.deepcopy(rng.choice(ODD))
    elif what < 0.6:
        at[key] = rng.choice(NAMES)
    elif what < 0.65 and keys:
        del at[rng.choice(keys)]
    elif what < 0.7 and isinstance(at, dict):
        at[rng.choice(NAMES)] = copy.deepcopy(rng.choice(ODD))
    elif what < 0.75 and isinstance(at, dict) and keys:
        at[rng.choice(NAMES)] = at.pop(rng.choice(keys))
    elif what < 0.8:
        at[key] = nested(rng.choice((3, 50, 400)))
    elif isinstance(number := at[key] if key in keys else 1, int | float) and abs(number) < 2**64:
        at[key] = number * rng.choice((-1, 0, 10, 10**6, 10**12, 0.5)) + rng.choice((0, 1, -1))
    elif isinstance(number, list):
        at[key] = number * rng.choice((2, 100, 10_000))


def rename(rng: random.Random, config: dict[str, Any]) -> None:
    """Names and texts that stay of their type, so that the folder is likely to load."""
    for _ in range(rng.choice((1, 2))):
        where = rng.randrange(5)
        name = rng.choice(NAMES)
        if where < 2:
            names = config[("classes", "features")[where]]
            names[rng.randrange(len(names))] = name
        elif where == 2:
            config["provenance"][rng.choice(("study", "data", name))] = rng.choice((name, {name: name}, [name]))
        elif where == 3:
            config["columns"][rng.choice(("label", "id", "step", "group", name))] = name
        elif part := config.get("validation"):
            part.setdefault(rng.choice(("metrics", "undefined", "methods")), {})[rng.choice((name, "auroc"))] = (
                rng.choice((0.5, name))
            )


def damage_config(rng: random.Random, path: Path) -> None:
    config = json.loads(path.read_bytes())
    what = rng.randrange(12)
    if what == 0:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
        return
    if what == 1:
        depth = rng.choice((10, 900, 5_000, 200_000))
        path.write_text(
            rng.choice(
                (
                    "[" * depth,
                    '{"a":' * depth,
                    "[" * depth + "]" * depth,
                    "9" * depth,
                    '"' + "a" * depth,
                    "-" * depth,
                    path.read_text().replace("null", "[" * depth + "]" * depth),
                )
            )
        )
        return
    if what < 5:
        rename(rng, config)
    else:
        for _ in range(rng.choice((1, 1, 2, 3))):
            change_config(rng, config)
    path.write_text(json.dumps(config), encoding="utf-8")


def damage_weights(rng: random.Random, path: Path) -> None:
    """Header, values, types or length of the safetensors file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    what = rng.randrange(9)
    tensors = [name for name in header if name != "__metadata__"]
    name = rng.choice(tensors)
    entry = header[name]
    if what == 0:
        path.write_bytes(damage_bytes(rng, content))
        return
    if what == 1:
        path.write_bytes(
            rng.choice((0, 1, 2, size + 1, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little") + content[8:]
        )
        return
    if what == 2:
        for at in rng.sample(range(0, len(data) - 3, 4), rng.choice((1, 3, len(data) // 4))):
            value = rng.choice((float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 3e38, 1e-45, 0.0, -0.0, 1e20))
            data[at : at + 4] = np.float32(value).tobytes()
    elif what == 3:
        typed(rng, path, header, data)
        return
    elif what == 4:
        key = rng.choice(("dtype", "shape", "data_offsets", "x"))
        entry[key] = rng.choice(
            (
                "F64",
                "I64",
                "BOOL",
                "F16",
                "x",
                None,
                [],
                [2**40],
                [2**63, 2],
                [-1],
                [0],
                [0, 2**50],
                [0, 0],
                [4, 0],
                [2**64],
                entry["shape"] + [1],
                entry["shape"][::-1],
                [10**30],
                "\x1b",
            )
        )
    elif what == 5:
        header[rng.choice((*NAMES, "member.9.mean", "member.0.lstm.x", "member.-1.mean"))] = rng.choice(
            (entry, copy.deepcopy(entry), header.pop(name))
        )
    elif what == 6:
        header["__metadata__"] = rng.choice(({}, {"a": "b" * 10_000}, {"a": 1}, None, [], {"\x1b": "\x1b"}))
    elif what == 7:
        for i in range(rng.choice((1, 1000, 30_000))):
            header[f"member.{i}.{rng.choice(('mean', 'x', 'head.bias'))}"] = {
                "dtype": "F32",
                "shape": [0],
                "data_offsets": [0, 0],
            }
    else:
        data = data[: rng.randrange(len(data))] if rng.random() < 0.5 else data + bytes(rng.choice((1, 4, 1000)))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def typed(rng: random.Random, path: Path, header: dict[str, Any], data: bytearray) -> None:
    """The same tensors in other types."""
    types = {
        "F64": 8,
        "F16": 2,
        "BF16": 2,
        "I64": 8,
        "U8": 1,
        "BOOL": 1,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
        "I8": 1,
        "U64": 8,
        "C64": 8,
        "F4": 1,
        "F8_E8M0": 1,
        "I32": 4,
    }
    kind = rng.choice(list(types))
    parts, offset = [], 0
    some = rng.random() < 0.5
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        part = bytes(data[begin:end])
        if not some or rng.random() < 0.3:
            count = (end - begin) // 4
            part = {
                "F64": np.frombuffer(part, "<f4").astype("<f8") * rng.choice((1, 1e300)),
                "F16": np.frombuffer(part, "<f4").astype("<f2"),
            }.get(kind, np.ones(count * types[kind], np.uint8)).tobytes()
            entry["dtype"] = kind
        parts.append(part)
        entry["data_offsets"] = [offset, offset + len(part)]
        offset += len(part)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def displace(rng: random.Random, folder: Path) -> None:
    """A file that is gone, or something else in its place."""
    path = folder / rng.choice(
        ("model.safetensors", "config.json", "README.md", "curves.svg", "SHA256SUMS", "model.onnx")
    )
    if path.exists():
        path.unlink()
    what = rng.randrange(9)
    if what == 0:
        path.mkdir()
    elif what == 1:
        os.mkfifo(path)
    elif what < 4:
        path.symlink_to(
            rng.choice(("/dev/zero", "/dev/null", "gone", path.name, "/proc/self/mem", "/", "..", "config.json"))
        )
    elif what == 4:
        path.write_bytes(b"")
    elif what == 5:
        with path.open("wb") as file:
            file.truncate(rng.choice((10**6, 3 * 10**8, 10**9)))  # without a block on the disk
    elif what == 6:
        (folder / rng.choice(NAMES[2:6])).write_bytes(b"x")
    elif what == 7:
        path.write_bytes(os.urandom(0) + b"\xff" * 1000)


def damage_sums(rng: random.Random, path: Path) -> None:
    text = path.read_text() if path.exists() else ""
    line = "0" * 64 + "  "
    path.write_bytes(
        rng.choice(
            (
                lambda: damage_bytes(rng, text.encode()),
                lambda: (text + line + rng.choice(NAMES) + "\n").encode(errors="replace"),
                lambda: (text + line + "x" * 300 + "\n").encode(),
                lambda: (text + line + "..\n").encode(),
                lambda: (line + "a\n").encode() * 100_000,
                lambda: (text * 200).encode(),
                lambda: b"\n" * 100_000,
                lambda: b"",
            )
        )()
    )


def make_input(seed: int, folder: Path) -> Path:
    """The model folder of that seed."""
    rng = random.Random(seed)
    model = folder / "model"
    shutil.copytree(rng.choice(valid_models()), model)
    sums, what = model / "SHA256SUMS", rng.random()
    if what < 0.55:
        damage_config(rng, model / "config.json")
    if 0.45 < what < 0.85:
        damage_weights(rng, model / "model.safetensors")
    listed = rng.random()
    if listed < 0.6:
        from hpo.models.bundle.checksums import write_checksums

        write_checksums(model)
    elif listed < 0.9 and sums.exists():
        sums.unlink()
    if what > 0.95:
        damage_sums(rng, sums)
    elif what > 0.85:
        displace(rng, model)
    return model


# ------------------------------------------------------------------------------------------------------- the way


def attempt_of(model: Path, folder: Path, format: str) -> Trial:
    """What a user does with a model folder."""
    data = folder / "data.npz"
    write_data(model, data)

    def use() -> None:
        import hpo
        from hpo.models.bundle.card import readme
        from hpo.models.bundle.evaluation import evaluate
        from hpo.models.bundle.export import export
        from hpo.terminal import show_evaluation, show_predictions

        bundle = hpo.load(model)
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            try:
                found = bundle.predict(bundle.read(data))
                check_probabilities(found.probabilities)
                show_predictions(found)
                found.to_csv(folder / "predictions.csv")
                show_evaluation(evaluate(bundle, data))
            except hpo.DataError as error:  # this folder may still be exported
                shown.write(str(error) + "\n")
        check_text(shown.getvalue(), "the terminal")
        check_card(readme(bundle.config))
        export(bundle, folder / "exported", format)
        check_card((folder / "exported" / "README.md").read_text(encoding="utf-8"))

    libraries = 1024 * MIB if format == "pt2" else 0  # that its exporter loads at first use
    return Trial(use, allowed(model) + libraries, sum(map(used, model.rglob("*"))))


def write_data(model: Path, path: Path) -> None:
    """Nine sequences, with labels of the model's classes where they can be read, else of others."""
    names: Any = ["class 0", "class 1"]
    features = 2
    with contextlib.suppress(Exception):
        config = json.loads((model / "config.json").read_bytes()) if (model / "config.json").is_file() else {}
        features = min(int(config["classifier"]["features"]), 100)
        names = [str(name) for name in config["classes"]][:100] or names
    rng = np.random.default_rng(0)
    labels = np.array([names[i % len(names)] for i in range(9)], dtype=str)
    np.savez(path, X=rng.normal(size=(9, 6, max(features, 1))), y=labels)


def check_probabilities(found: Any) -> None:
    assert np.isfinite(found).all(), "probabilities that are no numbers"
    assert np.allclose(found.sum(1), 1, atol=1e-4), "probabilities that do not sum to 1"


def check_text(text: str, what: str) -> None:
    """No letter in it that a terminal obeys."""
    bad = {letter for letter in text if (unicodedata.category(letter) == "Cc" and letter != "\n") or letter in TURNS}
    assert not bad, f"{what} shows {sorted(bad)!r}"


def check_card(text: str) -> None:
    """No name in it is HTML or a link."""
    check_text(text, "the card")
    text.encode()
    plain = re.sub(r"(?ms)^```\w+$.*?^```$", "", text)
    plain = re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", plain)
    assert not re.search(r"<[A-Za-z/!?]", plain), "HTML in the card"
    links = set(re.findall(r"\]\([^)]*\)", plain)) - {
        f"]({name}.svg)" for name in ("curves", "confusion", "reliability")
    }
    assert not links, "a link in the card"


def attempt(seed: int, folder: Path) -> Trial:
    format = {3: "onnx", 103: "onnx", 203: "pt2"}.get(seed % 300, "safetensors")
    return attempt_of(make_input(seed, folder), folder, format)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    fuzzing.main(__file__, __doc__, attempt)
