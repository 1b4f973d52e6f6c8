"""Export of a saved model: the folder alone, or with one graph of all members, checked against torch.

The graph takes `values` (N, T, F) float32 and `lengths` (N,) int64, both of any N and T (pooling `flatten`
without a crop: of the training length), and gives `probabilities` (N, K), averaged over the k members and calibrated;
NaN for a sequence that holds a NaN or an infinity, as a graph fills no gaps. What lies behind a sequence's end never
counts. Of a model with missing = "mask" the marks of the features stand behind them (`hpo.models.data.gaps.inputs`);
of several configurations each network takes as many of a step's numbers as it is given, from the left.

Exporters that follow the program, `torch.export` and with it the newer ONNX one, fix T of `nn.LSTM` to that of the
sample. ONNX therefore comes from the tracing exporter, and pt2 (for the CPU) runs the recurrence as a `scan` over the
steps.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpo.errors import HpoError
from hpo.models.bundle import card
from hpo.models.bundle.bundle import FILES, Bundle, load, model_folder
from hpo.models.bundle.config import BundleError
from hpo.models.classifier import Classifier, averaged
from hpo.models.config import ClassifierConfig
from hpo.models.data.gaps import inputs
from hpo.models.data.sequences import Sequences, from_arrays

FORMATS = ("safetensors", "onnx", "pt2")
OPSET = 17  # of ONNX: the newest that the tracing exporter has in torch 2.11
TOLERANCE = 1e-5
"""Largest difference of a probability. Float32 sums of the same terms in another order differ by some 1e-7, which
grows a little over the steps (3e-6 measured over 300); a graph with a wrong step, direction or member differs by
1e-2 and more. A temperature below 1 enlarges differences as much as it sharpens probabilities (`_tolerance`)."""
STEPS_MOST = 2**17
BEGINS = {
    ".svg": (b'<svg xmlns="http://www.w3.org/2000/svg"', "SVG picture"),
    ".png": (b"\x89PNG\r\n\x1a\n", "PNG picture"),
    ".html": (b"<!doctype html>", "page"),
}  # of copied files
CHECKED = 32  # real sequences that the graph is run on

Run = Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float32]]


class ExportError(HpoError):
    """The model cannot be exported like this, or the exported graph does not give torch's answers."""


def export(
    model: str | Path | Bundle,
    out: str | Path,
    format: str = "safetensors",
    *,
    sequences: Sequences | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder that works without database and return it; it appears whole or not at all.

    "safetensors" copies the saved model. "onnx" adds model.onnx and "pt2" model.pt2 (loads with torch alone); the
    file is run and must give torch's probabilities within `_tolerance`, on drawn sequences of different lengths and
    batch sizes and on some of `sequences`, if given. `overwrite` replaces a saved model in `out`.
    Raises ExportError and BundleError; then nothing is kept.
    """
    if format not in FORMATS:
        raise ExportError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    folder = model.folder if isinstance(model, Bundle) else Path(model)
    if folder is None:
        raise ExportError("only a saved model can be exported: save it and load its folder")
    bundle = load(folder)
    if format != "safetensors":
        _check_steps(bundle)
    with model_folder(Path(out), overwrite) as beside:
        copied = [name for name in (*FILES, *card.PICTURES_BEFORE) if name != "README.md" and (folder / name).is_file()]
        for name in copied:
            _copy(folder / name, beside / name)
        (beside / "README.md").write_text(card.readme(bundle.config, format, copied), encoding="utf-8")
        if format != "safetensors":
            _write_checked(bundle, beside / f"model.{format}", sequences)
    return Path(out)


def _copy(file: Path, to: Path) -> None:
    """Copy a file of a saved model. Raises BundleError for a picture or page that is none, as a link may be."""
    if file.suffix not in BEGINS:
        shutil.copyfile(file, to)
        return
    try:
        content = file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror or error}") from None
    begin, what = BEGINS[file.suffix]
    if not content.startswith(begin):
        raise BundleError(f"{file} is no {what}: remove it, or fetch the model again")
    to.write_bytes(content)


def _check_steps(bundle: Bundle) -> None:
    """Raise ExportError for a model whose graph could be checked on sequences of unlikely length alone."""
    found = [each.classifier for each in bundle.config.components]
    longest = max(max(each.steps, each.sequence_length, each.reduction) for each in found)
    if longest > STEPS_MOST:
        rule = f"a graph is checked on sequences as long as in training, and of at most {STEPS_MOST:,} steps"
        raise ExportError(f"{rule}, got {longest:,}; the safetensors export has no such limit")


def _write_checked(bundle: Bundle, path: Path, sequences: Sequences | None) -> None:
    """Write the graph, run it, compare."""
    write, run = {".onnx": (_write_onnx, _run_onnx), ".pt2": (_write_pt2, _run_pt2)}[path.suffix]
    if path.suffix == ".onnx":
        _require_onnx()
    parts = _drawn(bundle) + ([] if sequences is None else _real(bundle, sequences))
    try:
        with _quiet():
            write(bundle, path)
            graph = run(path)
            difference = _difference(bundle, graph, parts)
            silent = _silent_gaps(bundle, graph, parts)
    except Exception as error:  # whatever an exporter raises
        raise ExportError(f"torch {torch.__version__} cannot export this model as {path.name}: {error}") from error
    if not difference <= (most := _tolerance(bundle)):
        raise ExportError(
            f"{path.name} must give torch's probabilities within {most:.3g}, its largest difference is "
            f"{difference:.2g}; nothing was kept, the safetensors export holds the same model"
        )
    if silent:
        raise ExportError(
            f"{path.name} must give NaN for a sequence with {silent}, and torch's probabilities for the others; "
            "nothing was kept, the safetensors export holds the same model"
        )


def _tolerance(bundle: Bundle) -> float:
    return TOLERANCE * max(1.0, 1 / bundle.config.temperature)


def _difference(bundle: Bundle, run: Run, parts: list[Sequences]) -> float:
    """The largest difference between the graph's and torch's probabilities, NaN if one is not a number."""
    found = [run(inputs(part, bundle.config.widest), part.lengths) for part in parts]
    differences = [np.abs(one - bundle.predict(part).probabilities) for one, part in zip(found, parts, strict=True)]
    return float(np.concatenate([difference.ravel() for difference in differences]).max())


def _silent_gaps(bundle: Bundle, run: Run, parts: list[Sequences]) -> str:
    """The value that the graph takes for a number, or that changes an answer from behind a sequence's end; or ""."""
    for gap in (np.nan, np.inf):
        for part in parts:
            values = inputs(part, bundle.config.widest).copy()
            values[np.arange(part.steps) >= part.lengths[:, None]] = gap
            gapped = np.arange(part.n) % 2 == 0
            values[gapped, part.lengths[gapped] - 1, -1] = gap
            expected = bundle.predict(part).probabilities
            expected[gapped] = np.nan
            if not np.allclose(run(values, part.lengths), expected, rtol=0, atol=_tolerance(bundle), equal_nan=True):
                return str(gap)
    return ""


def _drawn(bundle: Bundle) -> list[Sequences]:
    """Batches of normal random sequences: several and one, longer and shorter than in training, down to one step."""
    config, rng = bundle.config.widest, np.random.default_rng(0)
    flattened = [each.classifier for each in bundle.config.components if each.classifier.pooling == "flatten"]
    least = max((each.kept_steps for each in flattened), default=1)
    mean, deviation = (getattr(bundle.models[0], name)[: config.features].numpy() for name in ("mean", "deviation"))
    shapes = [(3, config.steps), (1, config.steps), (5, config.steps)]
    if not _fixed_length(bundle):
        shapes += [(4, config.steps + 3), (2, max(least, config.steps // 2)), (1, least), (2, least)]
    batches = []
    for N, T in shapes:
        lengths = np.append(rng.integers(least, T + 1, N - 1), T if N > 1 else rng.integers(least, T + 1))
        values = rng.normal(size=(N, T, config.features)) * deviation + mean
        batches.append(from_arrays(values, lengths=lengths, features=bundle.config.features))
    return [_with_gaps(batch, config, rng) for batch in batches] if config.marks else batches


def _with_gaps(part: Sequences, config: ClassifierConfig, rng: np.random.Generator) -> Sequences:
    """The same with a third of its values marked as filled and, where the network is told times, with drawn ones."""
    inside = np.arange(part.steps) < part.lengths[:, None]
    observed = (rng.random(part.values.shape) < 2 / 3) & inside[:, :, None]
    far = config.interval * rng.uniform(0.5, 2, (part.n, part.steps))
    times = np.where(inside, np.cumsum(far, axis=1) - far[:, :1], 0.0)
    return replace(part, observed=observed, times=times)


def _real(bundle: Bundle, sequences: Sequences) -> list[Sequences]:
    """Of the data at most CHECKED sequences from the shortest to the longest, together, some, and one alone."""
    order = np.argsort(sequences.lengths, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, CHECKED).astype(int))]
    parts = [chosen, chosen[::5], chosen[:1], chosen[-1:]]
    return [bundle.conform(sequences.take(part)) for part in parts]


def _sample(bundle: Bundle) -> tuple[Tensor, Tensor]:
    """Inputs to trace with: N and T above 1, and T so long that no step of the preparation is left out."""
    found = [each.classifier for each in bundle.config.components]
    T = max(max(each.steps, 2 * each.reduction, each.sequence_length) for each in found) + 1
    if _fixed_length(bundle):
        T = bundle.config.classifier.steps
    return torch.randn(3, T, bundle.config.widest.given), torch.full((3,), T)


def _fixed_length(bundle: Bundle) -> bool:
    """Whether every sequence must have exactly as many steps as in training."""
    return any(each.classifier.fixed_length for each in bundle.config.components)


def _known(probabilities: Tensor, unknown: Iterable[Tensor]) -> Tensor:
    """The probabilities, NaN for sequences that any of these (B,) marks as having a gap in what networks take. ONNX
    runtimes' LSTMs give numbers for it, and wrong ones."""
    for gaps in unknown:
        probabilities = probabilities.masked_fill(gaps[:, None], torch.nan)
    return probabilities


# ------------------------------------------------------------------ ONNX


class _Average(nn.Module):
    """The members' probabilities, averaged and calibrated."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.members = nn.ModuleList(bundle.models)
        self.temperature, self.weights = bundle.config.temperature, bundle.config.weights

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        members = cast(list[Classifier], list(self.members))
        found = [member(values[..., : member.config.given], lengths) for member in members]
        configurations = {member.config: member for member in members}.values()
        unknown = (member.unknown(values[..., : member.config.given], lengths) for member in configurations)
        return _known(averaged(found, self.temperature, self.weights), unknown)


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401  (the exporter needs it)
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ExportError(f"the onnx format needs {error.name}: pip install 'hpo[onnx]'") from None


def _write_onnx(bundle: Bundle, path: Path) -> None:
    batch = {0: "N"}
    values = batch if _fixed_length(bundle) else {0: "N", 1: "T"}
    torch.onnx.export(
        _Average(bundle).eval(),  # left in training mode otherwise: the exporter restores what it found
        _sample(bundle),
        path,
        dynamo=False,
        opset_version=OPSET,
        input_names=["values", "lengths"],
        output_names=["probabilities"],
        dynamic_axes={"values": values, "lengths": batch, "probabilities": batch},
    )


def _run_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(values: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = session.run(None, {"values": values, "lengths": lengths})[0]
        return found

    return run


# ------------------------------------------------------------------ pt2


class _AverageOfScans(nn.Module):
    """`_Average` with each configuration's recurrence as a scan."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.scans, begin = nn.ModuleList(), 0
        for each in bundle.config.components:
            self.scans.append(_Scan(bundle.models[begin : begin + each.members]))
            begin += each.members
        self.temperature, self.weights = bundle.config.temperature, bundle.config.weights

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        """values (B, T, given), lengths (B,) to probabilities (B, K)."""
        scans = cast(list[_Scan], list(self.scans))
        given = [scan.given(values) for scan in scans]
        logits = [one for scan, its in zip(scans, given, strict=True) for one in scan(its, lengths)]
        unknown = (scan.unknown(its, lengths) for scan, its in zip(scans, given, strict=True))
        return _known(averaged(logits, self.temperature, self.weights), unknown)


class _Scan(nn.Module):
    """Networks of one configuration with the recurrence as a scan, all members and directions in one.

    G = k members times D directions; S, B, H as in `hpo.models.classifier`.
    """

    def __init__(self, members: Sequence[Classifier]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.config = members[0].config

    def given(self, values: Tensor) -> Tensor:
        """What of the model's values (B, T, …) these networks take, with spare steps at the end, so that no branch on T
        is left: neither T < sequence_length nor a single patch."""
        spare = 0 if self.config.fixed_length else self.config.sequence_length or self.config.reduction
        return nn.functional.pad(values[..., : self.config.given], (0, 0, 0, spare))

    def unknown(self, values: Tensor, lengths: Tensor) -> Tensor:
        """(B,) bool: sequences with a gap."""
        return cast(Classifier, self.members[0]).unknown(values, lengths)

    def forward(self, values: Tensor, lengths: Tensor) -> list[Tensor]:
        """values (B, T + spare, given) of `given`, lengths (B,) to the k members' logits."""
        members = cast(list[Classifier], list(self.members))
        embedded = [member.embed(*member.prepare(values, lengths)) for member in members]
        counts = cast(Tensor, embedded[0][1])
        inputs = torch.stack([each for each, _ in embedded], 1)  # (S, k, B, inputs)
        outputs = inputs
        for layer in range(self.config.layers):
            outputs = self._layer(outputs, counts, layer)
        return [member.classify(outputs[:, i], inputs[:, i], counts) for i, member in enumerate(members)]

    def _layer(self, inputs: Tensor, counts: Tensor, layer: int) -> Tensor:
        """(S, k, B, inputs) to (S, k, B, D*H)."""
        if not self.config.bidirectional:
            return self._recur(inputs, [f"l{layer}"])
        steps = torch.arange(inputs.shape[0])[:, None]
        flipped = torch.where(steps < counts, counts - 1 - steps, steps)[:, None, :, None]

        def flip(tensor: Tensor) -> Tensor:
            return tensor.gather(0, flipped.expand(-1, tensor.shape[1], -1, tensor.shape[3]))

        both = self._recur(torch.cat([inputs, flip(inputs)], 1), [f"l{layer}", f"l{layer}_reverse"])
        k = len(self.members)
        return torch.cat([both[:, :k], flip(both[:, k:])], 3)

    def _recur(self, inputs: Tensor, suffixes: list[str]) -> Tensor:
        """One layer's cells over all steps, (S, G, B, inputs) to (S, G, B, H)."""
        from torch._higher_order_ops.scan import scan  # the public name is still to come

        recurrent = self._weights("weight_hh", suffixes).transpose(1, 2)  # (G, H, 4H)
        bias = self._weights("bias_ih", suffixes) + self._weights("bias_hh", suffixes)
        gates = inputs @ self._weights("weight_ih", suffixes).transpose(1, 2) + bias[:, None]

        def step(state: list[Tensor], gate: Tensor) -> tuple[list[Tensor], Tensor]:
            hidden, cell = state
            i, f, g, o = (gate + hidden @ recurrent).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            return [hidden, cell], hidden.clone()  # a scan's outputs must not share memory

        zeros = inputs.new_zeros(inputs.shape[1], inputs.shape[2], self.config.hidden_size)
        torch.compiler.reset()  # a scan compiled before, for another length, would be tried and tie this one to its own
        outputs: Tensor = scan(step, [zeros, zeros.clone()], gates, dim=0)[1]
        return outputs

    def _weights(self, kind: str, suffixes: list[str]) -> Tensor:
        """The weights of that kind of all directions and members, stacked: (G, …)."""
        lstms = [cast(Classifier, member).lstm for member in self.members]
        return torch.stack([getattr(lstm, f"{kind}_{suffix}") for suffix in suffixes for lstm in lstms])


def _write_pt2(bundle: Bundle, path: Path) -> None:
    any_size = torch.export.Dim.DYNAMIC
    values = {0: any_size} if _fixed_length(bundle) else {0: any_size, 1: any_size}
    with torch.no_grad():
        model = _AverageOfScans(bundle).eval()
        program = torch.export.export(model, _sample(bundle), dynamic_shapes=(values, {0: any_size}))
    torch.export.save(program, path)


def _run_pt2(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda values, lengths: module(torch.from_numpy(values), torch.from_numpy(lengths)).numpy()


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of their own deprecations and of shapes that are checked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
