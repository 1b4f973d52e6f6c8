"""How many sequences a second train on all cores: ours beside the loops that people write, in turns in one run.

    python benchmarks/training.py [--quick] [--rounds 5] [--window 1.5] [--cases 0 1 …] [--forms ours lightning …]
                                  [--before CHECKOUT]

(a) threads: DataLoader, nn.LSTM, BCE, Adam, `loss.item()` each step, packed sequences where lengths vary, at torch's
own number of threads: in one process, or in one a core; the faster of the two is the figure. (b) plain: the same with
one thread a process, one process a core. (c) lightning and (d) skorch, with one thread a process too (extra
`benchmarks`). Ours: our `Training`, one a core; as workers run it, on torch instead of native code, and in bfloat16;
with --before, as another checkout of this project trains. All train the same network on the same data, with the same
Adam, rate and batch size. Every process stays for the whole run and takes orders over a pipe; those of one form start
at the same instant and train for a window, the forms in turns, several rounds. Times are taken in the processes.

Shapes are (T, F, H, L, B): steps, features, hidden size, layers, batch size. Lengths: all T, or mean 0.55 T, or 0.3 T.
The share of the cores' peak counts the multiplications of the valid steps alone, forward and backward, against float32
multiply-adds in registers on all cores at once. The slower form of (a) is measured in one round alone where it is far
behind: a single step of it can take a minute.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import itertools
import logging
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

CODE = "HPO_BENCHMARK_CODE"  # in the environment of processes that train as another checkout does
# Python looks for modules beside the script first, where `storage` would be the benchmark of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
if CODE in os.environ:
    sys.path.insert(0, os.environ[CODE])

from hpo.models.config import ClassifierConfig, TrainingConfig  # noqa: E402
from hpo.models.data.sequences import Sequences, from_arrays  # noqa: E402
from hpo.models.machine import ONE_THREAD, prepare_process  # noqa: E402
from hpo.models.training.training import Training  # noqa: E402
from hpo.trial.build import lstm_kernel  # noqa: E402

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
PROCESSES = multiprocessing.get_context("spawn")
RATE = 1e-3  # Adam's
CHECKED = 16  # steps; some dozens later H = 256 has parted even from torch in float64: an unclipped training is chaotic
TOLERANCE = 1e-5  # relative, between the losses of a batch: other orders of summing
GEMM = 512  # rows of the square matrices that the peak is measured with where there is no compiler
FMA_ROUNDS = 100_000  # of PEAK's loop in one call
PEAK = """
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vector __attribute__((vector_size(4 * LANES)));

long lanes(void) { return LANES; }

float peak(long rounds)
{
    vector sum[12], factor = (vector){0} + 0.999f, term = (vector){0} + 0.001f, total = {0};
    for (int i = 0; i < 12; i++) sum[i] = (vector){0} + (float)i;
    for (long round = 0; round < rounds; round++)
        for (int i = 0; i < 12; i++) sum[i] = sum[i] * factor + term;
    for (int i = 0; i < 12; i++) total += sum[i];
    return total[0];
}
"""
HOPELESS = 2.0  # times slower
START_S = 0.05  # from the order to the instant at which all begin
BEFORE = "before"  # the form of another checkout
FORMS = ("threads", "plain", "ours", "torch", "bfloat16", "lightning", "skorch")
OWN = ("ours", "torch", "bfloat16")  # which share a process: with the native kernel, without it, in bfloat16
Train = Callable[[float], tuple[int, float]]  # until this time -> sequences trained, seconds


@dataclass(frozen=True)
class Case:
    """One shape and one distribution of lengths."""

    T: int
    F: int
    H: int
    L: int
    B: int
    target: float  # times (a)
    mean: float = 1.0  # of the lengths, share of T
    n: int = 512  # training sequences
    validation: int = 0  # sequences that each epoch validates on; 0: none, or as few as may be

    @property
    def name(self) -> str:
        return f"{self.T}, {self.F}, {self.H}, {self.L}, {self.B}"

    def lengths(self) -> Any:
        """(n + validation part,) valid steps; one sequence has all T."""
        random = np.random.default_rng(0)
        count = self.n + max(self.validation, 2)
        if self.mean == 1.0:
            return np.full(count, self.T)
        spread = random.beta(1, 0.9 / (self.mean - 0.1) - 1, count)  # of mean (mean - 0.1) / 0.9
        lengths = np.clip(np.round(self.T * (0.1 + 0.9 * spread)), 1, self.T).astype(int)
        lengths[0] = self.T
        return lengths

    def sequences(self) -> Sequences:
        """The training rows first, then the validation part: noise with a class's offset in the first feature."""
        lengths = self.lengths()
        random = np.random.default_rng(1)
        labels = np.arange(len(lengths)) % 2
        X = random.normal(0, 1, (len(lengths), self.T, self.F))
        X[:, :, 0] += 0.2 * labels[:, None]
        return from_arrays(X, labels, lengths)

    def flops(self) -> float:
        """Of the mean training sequence, forward and backward: what the valid steps need, products alone."""
        products = self.F * self.H + self.H * self.H + (self.L - 1) * 2 * self.H * self.H
        return float(2 * 4 * products * self.lengths()[: self.n].mean() * 3)


SHAPES = (
    Case(100, 1, 16, 1, 16, 2.4),
    Case(100, 9, 64, 1, 64, 1.3),
    Case(500, 1, 64, 1, 64, 2.4),
    Case(100, 9, 128, 2, 64, 1.9),
    Case(100, 9, 256, 1, 16, 1.35),
)
VARIABLE = SHAPES[:4]  # shapes that are measured at both distributions of lengths, too
VARIABLE_TARGET = 6.0


# --------------------------------------------------------------------------------------------------------- the forms


class Plain(nn.Module):
    """nn.LSTM and a linear layer on the last hidden state."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.lstm = nn.LSTM(case.F, case.H, case.L, batch_first=True)
        self.head = nn.Linear(case.H, 1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (B, T, F) and lengths (B,), None where all are T, to logits (B,)."""
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, (hidden, _) = self.lstm(x)
        return self.head(hidden[-1]).squeeze(1)


def tensors(case: Case) -> tuple[Dataset[Any], Dataset[Any]]:
    """Training and validation part: (x, y), or where lengths vary (x, lengths, y)."""
    sequences = case.sequences()
    parts = [torch.from_numpy(sequences.values), torch.from_numpy(sequences.labels).float()]
    if case.mean < 1:
        parts.insert(1, torch.from_numpy(sequences.lengths))
    return TensorDataset(*(part[: case.n] for part in parts)), TensorDataset(*(part[case.n :] for part in parts))


def plain(case: Case) -> Train:
    """The loop that people write."""
    train, validation = tensors(case)
    model, loss_function = Plain(case), nn.BCEWithLogitsLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    loader, validation_loader = DataLoader(train, case.B, shuffle=True), DataLoader(validation, case.B)

    def until(end: float) -> tuple[int, float]:
        began, seen, total = time.monotonic(), 0, 0.0
        while True:
            model.train()
            for *inputs, y in loader:
                optimizer.zero_grad()
                loss = loss_function(model(*inputs), y)
                loss.backward()
                optimizer.step()
                total += loss.item()
                seen += len(y)
                if time.monotonic() >= end and not case.validation:
                    return seen, time.monotonic() - began
            if case.validation:
                validate()
                if time.monotonic() >= end:
                    return seen, time.monotonic() - began

    def validate() -> float:
        model.eval()
        with torch.no_grad():
            losses = [loss_function(model(*inputs), y).item() for *inputs, y in validation_loader]
        return statistics.mean(losses)

    return until


def training(case: Case, precision: str = "float32", native: bool = True) -> Training:
    """Our training of the case, as a worker has it."""
    sequences = case.sequences()
    rows = np.arange(sequences.n)
    config = TrainingConfig(
        metric="log_loss",
        epochs=10**9,
        patience=None,
        batch_size=case.B,
        optimizer="adam",
        learning_rate=RATE,
        gradient_clip=0.0,
        precision=precision,
    )
    shape = ClassifierConfig(features=case.F, classes=2, steps=case.T, hidden_size=case.H, layers=case.L)
    kernel = lstm_kernel() if native else None
    return Training(sequences, [(rows[: case.n], rows[case.n :])], shape, config, kernel=kernel)


def ours(case: Case, precision: str = "float32", native: bool = True) -> Train:
    trained = training(case, precision, native)

    def until(end: float) -> tuple[int, float]:
        began, seen = time.monotonic(), 0
        while time.monotonic() < end:
            trained.advance()
            seen += case.n
        return seen, time.monotonic() - began

    return until


def lightning(case: Case) -> Train:
    """A LightningModule under a Trainer without logger, checkpoints and progress bar; its set-up is not counted."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = Plain(case), nn.BCEWithLogitsLoss()

        def training_step(self, batch: Any, _: int) -> Tensor:
            *inputs, y = batch
            return self.loss(self.model(*inputs), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=RATE)

    class Window(Callback):
        def __init__(self, end: float) -> None:
            self.end, self.began, self.ended, self.seen = end, 0.0, 0.0, 0

        def on_train_start(self, *_: Any) -> None:
            self.began = time.monotonic()

        def on_train_batch_end(self, trainer: Any, _: Any, __: Any, batch: Any, *___: Any) -> None:
            self.seen, self.ended = self.seen + len(batch[-1]), time.monotonic()
            trainer.should_stop = self.ended >= self.end

    module, loader = Module(), DataLoader(tensors(case)[0], case.B, shuffle=True)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

    def until(end: float) -> tuple[int, float]:
        window = Window(end)
        Trainer(accelerator="cpu", max_epochs=-1, callbacks=[window], **off).fit(module, loader)
        return window.seen, window.ended - window.began

    return until


def skorch(case: Case) -> Train:
    """A NeuralNet without validation split and printed log."""
    from skorch import NeuralNet
    from skorch.callbacks import Callback

    class Window(Callback):
        end = began = ended = 0.0
        seen = 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began, self.seen = time.monotonic(), 0

        def on_batch_end(self, _: Any, batch: Any = None, **__: Any) -> None:
            self.seen, self.ended = self.seen + len(batch[1]), time.monotonic()
            if self.ended >= self.end:
                raise KeyboardInterrupt  # skorch ends the fit and keeps what was learnt

    class Named(Dataset[Any]):
        """skorch passes a dictionary on as arguments by name."""

        def __init__(self, part: Dataset[Any]) -> None:
            self.part = part

        def __len__(self) -> int:
            return len(self.part)

        def __getitem__(self, index: int) -> Any:
            *inputs, y = self.part[index]
            return dict(zip(("x", "lengths"), inputs, strict=False)), y

    window = Window()
    net = NeuralNet(
        Plain,
        module__case=case,
        criterion=nn.BCEWithLogitsLoss,
        optimizer=torch.optim.Adam,
        lr=RATE,
        batch_size=case.B,
        iterator_train__shuffle=True,
        train_split=None,
        callbacks=[("window", window)],
        callbacks__print_log=None,
        verbose=0,
    ).initialize()
    window = dict(net.callbacks_)["window"]
    data = Named(tensors(case)[0])

    def until(end: float) -> tuple[int, float]:
        window.end = end
        net.partial_fit(data, None, epochs=10**9)
        return window.seen, window.ended - window.began

    return until


def compiled_peak(folder: Path) -> Path | None:
    """The library of PEAK, or None without a compiler."""
    library = folder / "peak.so"
    compiler = os.environ.get("CC", "cc").split()
    try:
        command = [*compiler, "-O3", "-march=native", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=PEAK, text=True, check=True)
    except FileNotFoundError:
        return None
    return library


def peak(library: Path | None) -> Train:
    """What a core can do at most, counted in float32 operations: fused multiply-adds within its registers, or without
    a compiler products of matrices."""
    if library is None:
        a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
        out = torch.empty(GEMM, GEMM)
        operations, run = 2 * GEMM**3, lambda: torch.mm(a, b, out=out)
    else:
        loaded = ctypes.CDLL(str(library))
        function = loaded.peak
        function.argtypes, function.restype = (ctypes.c_int64,), ctypes.c_float
        operations, run = FMA_ROUNDS * 12 * loaded.lanes() * 2, lambda: function(FMA_ROUNDS)

    def until(end: float) -> tuple[int, float]:
        began, count = time.monotonic(), 0
        while time.monotonic() < end:
            run()
            count += 1
        return operations * count, time.monotonic() - began

    return until


def difference(case: Case, native: bool) -> float:
    """The largest relative difference between our loss of a batch and the plain loop's, over the first CHECKED steps
    from the same weights on the same batches."""
    trained, model = training(case, native=native), Plain(case)
    member = trained.members[0]
    known = {
        name: value.clone() for name, value in member.learner.model.state_dict().items() if name in model.state_dict()
    }
    model.load_state_dict(known)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    worst = before = 0.0
    from hpo.models.training import native_steps  # not in earlier versions

    native_steps.SECONDS = 0.0  # one batch a call
    batches = map(member.train.batch, member.train.epoch(case.B, trained.config.seed, 0, 1))
    for batch, step in itertools.islice(zip(batches, member.epoch(1, RATE), strict=True), CHECKED):
        optimizer.zero_grad()
        logits = model(batch.values.transpose(0, 1), batch.lengths)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.float())
        loss.backward()
        optimizer.step()
        step()
        after = float(member.learner.loss_sum)
        worst, before = max(worst, abs((after - before) / (loss.item() * len(batch.labels)) - 1)), after
    return worst


# ----------------------------------------------------------------------------------------------------- the processes

MAKERS: dict[str, Callable[[Any], Train]] = {
    "threads": plain,
    "plain": plain,
    "ours": ours,
    "torch": partial(ours, native=False),
    "bfloat16": partial(ours, precision="bfloat16"),
    "lightning": lightning,
    "skorch": skorch,
    "peak": peak,
    BEFORE: ours,
}


def work(form: str, orders: Any) -> None:
    """A process: it is told ("load", form, its case), ("check", case, native), ("train", form, start, end) or None."""
    if form in (*OWN, BEFORE):
        prepare_process()
    elif form != "threads":
        torch.set_num_threads(1)
    loaded: dict[str, Train] = {}
    while (order := orders.recv()) is not None:
        if order[0] == "load":
            loaded[order[1]] = MAKERS[order[1]](order[2])
            loaded[order[1]](0.0)  # once, for what the first step of a process does
            orders.send("loaded")
        elif order[0] == "check":
            orders.send(difference(*order[1:]))
        else:
            time.sleep(max(0.0, order[2] - time.monotonic()))
            orders.send(loaded[order[1]](order[3]))


class Group:
    """The processes of one form."""

    def __init__(self, form: str, code: Path | None = None) -> None:
        """code: the checkout that it trains as; None: this one."""
        before = dict(os.environ)
        os.environ.update({} if form == "threads" else ONE_THREAD)
        if code is not None:
            os.environ[CODE] = str(code.resolve())
        self.form, self.pipes, self.processes = form, [], []
        for _ in range(CORES):
            here, there = PROCESSES.Pipe()
            process = PROCESSES.Process(target=work, args=(form, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)
        os.environ.clear()
        os.environ.update(before)

    def ask(self, order: Any, count: int | None = None) -> list[Any]:
        """Give an order to the first so many processes, all by default; their answers."""
        for pipe in self.pipes[:count]:
            pipe.send(order)
        return [pipe.recv() for pipe in self.pipes[:count]]

    def rate(self, form: str, window_s: float, count: int | None = None) -> float:
        """Sequences (or operations) a second, all these processes together."""
        start = time.monotonic() + START_S
        answers = self.ask(("train", form, start, start + window_s), count)
        return sum(seen / seconds for seen, seconds in answers)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def home(form: str) -> str:
    """The group of processes that trains a form."""
    return "ours" if form in OWN else form


def importable(forms: list[str]) -> list[str]:
    """Those that can be measured here; says which extra is missing for the others."""
    missing = [form for form in ("lightning", "skorch") if form in forms and importlib.util.find_spec(form) is None]
    for form in missing:
        print(f"{form} is not installed and left out: pip install 'hpo[benchmarks]'")
    return [form for form in forms if form not in missing]


@dataclass
class Rates:
    """What each round gave, by column: sequences a second, and the peak in operations a second."""

    of: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.of[name])

    @property
    def threads(self) -> str:
        """The faster form of (a)."""
        return max((name for name in ("threads", "threads x1") if name in self.of), key=self.median)

    def is_hopeless(self, name: str) -> bool:
        """Whether this is by far the slower form of (a), which is not worth another round."""
        return name.startswith("threads") and HOPELESS * self.median(name) < self.median(self.threads)

    def ratios(self, name: str, other: str) -> list[float]:
        return [a / b for a, b in zip(self.of[name], self.of[other], strict=True)]


def measure(groups: dict[str, Group], forms: list[str], case: Case, rounds: int, window_s: float) -> Rates:
    """All forms in turns."""
    homes = {form: groups[home(form)] for form in forms}
    for form, group in homes.items():
        group.ask(("load", form, case))
    found = Rates({})
    turns = [(form, form, group, None) for form, group in homes.items()]
    if "threads" in homes:
        turns.insert(0, ("threads x1", "threads", homes["threads"], 1))
    turns.append(("peak", "peak", list(homes.values())[-1], None))
    for _ in range(rounds):
        for column, form, group, count in turns:
            found.of.setdefault(column, []).append(group.rate(form, window_s, count))
        turns = [turn for turn in turns if not found.is_hopeless(turn[0])]
    return found


# ------------------------------------------------------------------------------------------------------- the tables


def spread(values: list[float], digits: int = 0) -> str:
    """Median and range."""
    median, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return median if len(values) == 1 else f"{median} ({low} to {high})"


def show(case: Case, rates: Rates, columns: list[str], reference: list[str], target: float | None) -> None:
    """A line: sequences a second of each column, then the ratios of ours to the references, then shares of the peak."""
    cells = [case.name, f"{case.mean:g}"] + [spread(rates.of[name]) if name in rates.of else "" for name in columns]
    if "ours" in rates.of:
        for name in reference:
            other = rates.threads if name == "a" and "threads" in rates.of else name
            cells.append(spread(rates.ratios("ours", other), 2) if other in rates.of else "")
        cells += [] if target is None else [f"{target:g}"]
        for name in ("ours", "bfloat16"):
            share = rates.median(name) * case.flops() / max(rates.of["peak"]) if name in rates.of else math.nan
            cells.append(f"{100 * share:.0f} %" if name in rates.of else "")
    print("| " + " | ".join(cells) + " |", flush=True)


def head(columns: list[str], reference: list[str]) -> None:
    """The table's head; only where (a) is a reference there is a target."""
    names = {"threads": f"(a) {CORES} processes", "threads x1": "(a) 1 process", "plain": "(b)"}
    names["torch"] = "ours on torch"
    cells = ["T, F, H, L, B", "mean length / T"] + [names.get(name, name) for name in columns]
    cells += [f"ours to {'(' + name + ')' if name == 'a' else names.get(name, name)}" for name in reference]
    cells += ["target to (a)"] if "a" in reference else []
    cells += ["share of peak", "bfloat16's"]
    print("\n| " + " | ".join(cells) + " |\n|" + "---|" * len(cells))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--window", type=float, default=1.5, help="seconds that each form trains in its turn")
    options.add_argument("--cases", type=int, nargs="+", help="of SHAPES, from 0; all by default")
    options.add_argument("--means", type=float, nargs="+", default=[1.0, 0.55, 0.3], help="lengths, share of T")
    options.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    options.add_argument("--validate", action=argparse.BooleanOptionalAction, default=True, help="the second table")
    options.add_argument("--quick", action="store_true", help="two shapes, few sequences, one short round")
    options.add_argument("--before", type=Path, help="another checkout, whose training is one more column")
    given = options.parse_args()
    if given.quick:
        given.rounds, given.window = 1, 0.3
    forms = importable(given.forms)
    shapes = [SHAPES[index] for index in given.cases or range(2 if given.quick else len(SHAPES))]
    cases = [
        replace(case, mean=mean, target=VARIABLE_TARGET) if mean < 1 else case
        for mean in given.means
        for case in shapes
        if mean == 1 or case in VARIABLE
    ]
    if given.quick:
        cases = [replace(case, n=8 * case.B) for case in cases]
    groups = {name: Group(name) for name in dict.fromkeys(map(home, forms))}
    if given.before is not None:
        groups[BEFORE] = Group(BEFORE, given.before)
        forms.append(BEFORE)
    try:
        report(groups, forms, cases, given)
    finally:
        for group in groups.values():
            group.close()


def check(group: Group, cases: list[Case]) -> None:
    """Hold our losses against the plain loop's, with the kernel and without."""
    worst = max(group.ask(("check", case, native), 1)[0] for case in cases for native in (True, False))
    print(f"losses of the first steps, ours to the plain loop's, same weights and batches: {worst:.1e} apart at most")
    assert worst < TOLERANCE, f"the losses must agree to {TOLERANCE}"


def report(groups: dict[str, Group], forms: list[str], cases: list[Case], given: argparse.Namespace) -> None:
    print(
        f"{CORES} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}; {given.rounds} rounds of windows of"
    )
    print(f"{given.window:g} s; sequences a second over all cores, median (range); ratios by round, median (range)")
    if "ours" in groups:
        kernel = lstm_kernel()  # compiled here, if need be
        print(
            f"ours runs LSTMs of float32 on {'torch: no kernel can be built here' if kernel is None else kernel.name}"
        )
        check(groups["ours"], cases)
    with tempfile.TemporaryDirectory() as folder:
        for group in groups.values():
            group.ask(("load", "peak", compiled_peak(Path(folder))))
    columns = ["threads", "threads x1", *(form for form in forms if form != "threads")]
    references = ["a", "plain", "lightning", "skorch", *([BEFORE] if BEFORE in forms else [])]
    head(columns, references)
    peaks = []
    for case in cases:
        rates = measure(groups, forms, case, given.rounds, given.window)
        peaks += rates.of["peak"]
        show(case, rates, columns, references, case.target)
    gigaflops = spread([value / 1e9 for value in peaks])
    print(f"\npeak: {gigaflops} GFLOP/s, float32, all cores at once; the highest of a line's rounds is its peak")
    if given.validate:
        forms = [form for form in forms if form in ("plain", "ours", "torch")]
        print("\nWith a validation on a fifth of the data after each epoch; training sequences a second:")
        head(forms, ["plain"])
        for case in cases:
            case = replace(case, validation=case.n // 4)
            show(case, measure(groups, forms, case, given.rounds, given.window), forms, ["plain"], None)


if __name__ == "__main__":
    main()
