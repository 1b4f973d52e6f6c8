"""How many trials an hour one GPU trains: the loop that people write, our Training with K slots, K fused trials.

    python benchmarks/gpu.py [--sections limits shape-0 …] [--minutes 9] [--go-on] [--cpu]

Shapes are (T, F, H, L, B): steps, features, hidden size, layers, batch size; `to T`: lengths from T/4 to T. (a) loop:
DataLoader, nn.LSTM (over packed sequences where lengths vary), BCE, Adam, `loss.item()` each step, tf32 in cuDNN as
torch has it by default. Ours: our `Training`, float32: eager, and with CUDA graphs in K slots, K threads with a stream
each; processes: the same slots in one process and spread over several. Fused: `experiments/fused.py`, K trials in one
kernel, as one CUDA graph. All train on 1,024 sequences with Adam or AdamW without clipping and validate on 256 after
each epoch. K doubles until it no longer pays or memory ends. Each variant is measured in windows that take turns with
windows of the loop; a ratio is of two neighbouring windows. `costs` is what a capture takes, and how much memory a
training, beside the estimate.

It runs unattended: every section is a process of its own with a time limit, and what is not begun after --minutes is
left for a call with --go-on, which keeps the rows so far. Each row goes to gpu.jsonl in $OUT, or in this folder, as
soon as it is measured. Without a GPU it says so and ends; --cpu is a dry run of the logic at tiny sizes: its figures
mean nothing. It needs torch, and triton for the fused kernel.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Python looks for modules beside the script first, where `storage` would be the benchmark of that name.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from hpo.models.classifier import Classifier  # noqa: E402
from hpo.models.config import ClassifierConfig, TrainingConfig  # noqa: E402
from hpo.models.data.sequences import Sequences, from_arrays  # noqa: E402
from hpo.models.machine import one_thread, prepare_process  # noqa: E402
from hpo.models.training.training import Training  # noqa: E402

CPU = "--cpu" in sys.argv
DEVICE = "cpu" if CPU else "cuda"
OUT = Path(os.environ.get("OUT", ".")) / "gpu.jsonl"
SECTION_S = {"limits": 30, "costs": 60, "fused": 85, "shape": 70, "processes": 60}  # at most, by the kind of section
ROUNDS, LOOP_S, WINDOW_S = (1, 0.0, 0.0) if CPU else (3, 0.2, 0.4)  # windows of one whole epoch at least
N, VALIDATION = (16, 4) if CPU else (1024, 256)  # sequences
EPOCHS = 50  # of the trials that are counted by the hour
RATE = 1e-3
PAYS = 1.05  # times the best rate so far: less is no gain
SLOTS = (1, 2) if CPU else (1, 2, 4, 8, 16, 30)  # torch hands out 32 streams a device
TRIALS = (1, 2) if CPU else (16, 32, 64, 128, 256, 512, 1024, 2048)  # of the fused kernel
TUNED_AT = TRIALS[-1] if CPU else 128  # trials with which the warps are chosen
TOLERANCE = {"ieee": 1e-3, "tf32": 5e-2, "bf16": 2e-1}  # of the fused kernel, share of the largest element


@dataclass(frozen=True)
class Shape:
    T: int
    F: int
    H: int
    L: int
    B: int
    target: float | None = None  # times (a)
    variable: bool = False  # lengths from T/4 to T

    @property
    def name(self) -> str:
        return f"({'to ' * self.variable}{self.T}, {self.F}, {self.H}, {self.L}, {self.B})"

    def flops(self) -> float:
        """Of the products of one sequence, forward and backward."""
        return 3 * self.T * 2 * 4 * (self.F * self.H + self.H * self.H + (self.L - 1) * 2 * self.H * self.H)

    def sequences(self) -> Sequences:
        """The training rows first, then the validation part: noise with a class's offset in the first feature."""
        labels = np.arange(N + VALIDATION) % 2
        random = np.random.default_rng(1)
        X = random.normal(0, 1, (len(labels), self.T, self.F))
        X[:, :, 0] += 0.2 * labels[:, None]
        least = max(1, self.T // 4) if self.variable else self.T
        lengths = random.integers(least, self.T + 1, len(labels))
        return from_arrays([x[:length] for x, length in zip(X, lengths, strict=True)], labels)

    def classifier(self, **given: Any) -> ClassifierConfig:
        shape = {"features": self.F, "classes": 2, "steps": self.T, "hidden_size": self.H, "layers": self.L}
        return ClassifierConfig(**(shape | given))  # type: ignore[arg-type]


SHAPES = (
    Shape(100, 1, 16, 1, 16, 20),
    Shape(100, 9, 64, 1, 64, 20),
    Shape(500, 1, 64, 1, 64, 20),
    Shape(100, 9, 128, 2, 64),
    Shape(100, 9, 256, 1, 16, 5),
    Shape(26, 12, 32, 1, 32, 20, variable=True),
    Shape(100, 9, 64, 2, 64, variable=True),
)
if CPU:
    SHAPES = (Shape(4, 2, 3, 1, 8, 20), Shape(8, 2, 3, 1, 8, variable=True))

Train = Callable[[float], tuple[int, float]]  # until this time -> training sequences of all trials, seconds


def emit(**row: Any) -> None:
    with OUT.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows() -> list[dict[str, Any]]:
    if not OUT.exists():
        return []
    return [json.loads(line) for line in OUT.read_text().splitlines()]


def synchronize() -> None:
    if not CPU:
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------ the variants


class Plain(nn.Module):
    """nn.LSTM and a linear layer on its last step, of packed sequences where lengths vary."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.lstm = nn.LSTM(shape.F, shape.H, shape.L, batch_first=True)
        self.head = nn.Linear(shape.H, 1)
        self.variable = shape.variable

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if self.variable:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.head(self.lstm(packed)[1][0][-1]).squeeze(1)
        return self.head(self.lstm(x)[0][:, -1]).squeeze(1)


def epochs(epoch: Callable[[], Any], trials: int = 1) -> Train:
    """Whole epochs, each of which waits for the device, until the time is over."""

    def until(end: float) -> tuple[int, float]:
        began, count = time.monotonic(), 0
        while count == 0 or time.monotonic() < end:
            epoch()
            count += 1
        return count * N * trials, time.monotonic() - began

    return until


def loop(shape: Shape) -> Train:
    """(a), the loop that people write."""
    data = shape.sequences()
    x, y, n = torch.from_numpy(data.values), torch.from_numpy(data.labels).float(), torch.from_numpy(data.lengths)
    parts = TensorDataset(x[:N], y[:N], n[:N]), TensorDataset(x[N:], y[N:], n[N:])
    loader, validation_loader = DataLoader(parts[0], shape.B, shuffle=True), DataLoader(parts[1], shape.B)
    model, loss_function = Plain(shape).to(DEVICE), nn.BCEWithLogitsLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)

    def epoch() -> float:
        total = 0.0
        model.train()
        for x, y, n in loader:
            x, y = x.to(DEVICE), y.to(DEVICE)
            optimizer.zero_grad()
            loss = loss_function(model(x, n), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
        model.eval()
        with torch.no_grad():
            for x, y, n in validation_loader:
                total += loss_function(model(x.to(DEVICE), n), y.to(DEVICE)).item()
        return total

    run = epochs(epoch)

    def until(end: float) -> tuple[int, float]:
        with tf32(True):
            return run(end)

    return until


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether cuDNN may round to tf32, as torch lets it by default; `prepare_process` says no."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def training(shape: Shape, seed: int, graphs: bool = True, **given: Any) -> Training:
    """Our training of one trial."""
    rows = np.arange(N + VALIDATION)
    config = TrainingConfig(
        metric="log_loss",
        epochs=10**9,
        patience=None,
        batch_size=shape.B,
        optimizer="adam",
        learning_rate=RATE,
        gradient_clip=0.0,
        seed=seed,
    )
    parts = [(rows[:N], rows[N:])]
    return Training(
        shape.sequences(), parts, shape.classifier(**given), config, DEVICE, graphs=graphs, fixed_shapes=True
    )


class Slots:
    """K trainings at once, each in a thread of its own."""

    def __init__(self, shape: Shape, K: int, graphs: bool = True) -> None:
        self.threads = [ThreadPoolExecutor(1, initializer=one_thread) for _ in range(K)]
        self.trainings = self.each(lambda seed: training(shape, seed, graphs), range(K))

    def each(self, call: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Any]:
        """Each thread's answer, all at once."""
        waiting = [thread.submit(call, given) for thread, given in zip(self.threads, arguments, strict=True)]
        return [answer.result() for answer in waiting]

    def __call__(self, end: float) -> tuple[int, float]:
        answers = self.each(lambda own: epochs(own.advance)(end), self.trainings)
        return sum(seen for seen, _ in answers), max(seconds for _, seconds in answers)

    def close(self) -> None:
        self.each(lambda own: own.close(), self.trainings)
        for thread in self.threads:
            thread.shutdown()


def fused_trials(shape: Shape, K: int, precision: str) -> Train:
    """K fused trials, their step a CUDA graph."""
    from experiments import fused

    torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
    data = shape.sequences()
    models = [Classifier(shape.classifier()).to(DEVICE)] * K  # weights have no say in how long it takes
    values, lengths, labels = (torch.from_numpy(part[:N]) for part in (data.values, data.lengths, data.labels))
    trials = fused.FusedTrials(models, values, lengths, labels, shape.B, [RATE] * K, [0.0] * K, precision)
    step = trials.step if CPU else trials.captured()
    torch.set_float32_matmul_precision("highest")
    values, lengths = (torch.from_numpy(part[N:]).to(DEVICE) for part in (data.values, data.lengths))

    def epoch() -> None:
        trials.begin_epoch(torch.rand(K, N, device=DEVICE).argsort(1))
        for _ in range(N // shape.B):
            step()
        trials.predict(values, lengths).cpu()

    return epochs(epoch, K)


# ------------------------------------------------------------------------------------------------------ the sections


def limits() -> None:
    """What the card can do: products of large matrices and copies."""
    size, memory = (64, 2**16) if CPU else (8192, 2**31)
    found = {}
    for name, kind, precision in (
        ("fp32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bf16", torch.bfloat16, "high"),
    ):
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(size, size, device=DEVICE).to(kind) for _ in range(2))
        found[name] = 2 * size**3 / seconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    source, copy = (torch.zeros(memory, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    found["copy"] = 2 * memory / seconds(lambda: copy.copy_(source))
    name = "CPU" if CPU else torch.cuda.get_device_name()
    emit(limits=found, device=name, torch=torch.__version__, cudnn=torch.backends.cudnn.version())


def seconds(call: Callable[[], Any], times: int = 8) -> float:
    """Median of a call that runs on the device, after two that warm it up."""
    taken = []
    for _ in range(times + 2):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


def costs() -> None:
    """What captures cost in time and memory, and how good the estimate of memory is."""
    for shape in SHAPES:
        guard(f"costs of {shape.name}", lambda shape=shape: emit(costs=shape.name, **costs_of(shape)))  # type: ignore[misc]


def costs_of(shape: Shape) -> dict[str, Any]:
    """Milliseconds of the first epochs, of one that is captured and of one that is not; MiB taken and estimated."""
    found: dict[str, Any] = {}
    for graphs in (False, True):
        release()
        before = 0 if CPU else torch.cuda.memory_reserved()
        with training(shape, 0, graphs) as run:
            times = [1e3 * run.advance().seconds for _ in range(6)]
            if not CPU:
                torch.cuda.empty_cache()
                found["graphs MiB" if graphs else "resident MiB"] = (torch.cuda.memory_reserved() - before) / 2**20
            fixed = run.members[0].fixed
            found |= {"shapes": len(fixed.replays), "estimate MiB": run.bytes / 2**20}
            found["graph ms" if graphs else "eager ms"] = [times[0], statistics.median(times[3:])]
    return found


def processes() -> None:
    """The same number of slots in one process and spread over several, which a card runs in turns without MPS."""
    shape, seconds = SHAPES[0 if CPU else 1], 0.2 if CPU else 3.0
    for count, slots in ((1, 2), (2, 1)) if CPU else ((1, 4), (2, 2), (4, 1), (4, 4)):
        start = time.time() + (5.0 if CPU else 9.0)  # all have begun by then
        command = [sys.executable, __file__, "--section", "beside", "--beside", str(slots), str(start), str(seconds)]
        started = [
            subprocess.Popen([*command, *(["--cpu"] if CPU else [])], stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]
        rates = [float(process.communicate()[0].split()[-1]) for process in started]
        emit(beside=shape.name, processes=count, slots=slots, rate=sum(rates))


def beside(slots: int, start: float, seconds: float) -> None:
    """One of several processes: sequences a second of its slots, from a common moment on."""
    run = Slots(SHAPES[0 if CPU else 1], slots)
    run(0.0)
    time.sleep(max(0.0, start - time.time()))
    seen, taken = run(time.monotonic() + seconds)
    run.close()
    print(seen / taken)


def fused() -> None:
    """Whether the fused kernel gives what the plain ways give."""
    small = Shape(3, 2, 5, 1, 8) if CPU else Shape(60, 3, 24, 2, 32)
    guard("fused steps", lambda: compare_fused_steps(small))
    for hidden in (3,) if CPU else (16, 64, 128, 256):
        for precision in TOLERANCE:
            guard("fused error", lambda H=hidden, P=precision: emit(check="fused error", **fused_error(H, P)))  # type: ignore[misc]


def compare_fused_steps(shape: Shape) -> None:
    """Fused trials stepped as a graph and eagerly; of hidden sizes that differ, none may touch its padding."""
    from experiments import fused

    data = shape.sequences()
    found = []
    for captured in (True, False):
        torch.manual_seed(0)
        models = [Classifier(shape.classifier(hidden_size=size)).to(DEVICE) for size in (3, shape.H, shape.H - 1)]
        values, lengths, labels = (torch.from_numpy(part[:N]) for part in (data.values, data.lengths, data.labels))
        trials = fused.FusedTrials(models, values, lengths, labels, shape.B, [RATE] * 3, [0.1] * 3, "tf32")
        step = trials.captured() if captured and not CPU else trials.step
        for _ in range(5 if captured and not CPU else 8 if not CPU else 2):  # a capture makes three of its own
            step()
        synchronize()
        found.append(trials)
    equal = torch.equal(found[0].flat, found[1].flat) and bool(torch.isfinite(found[0].flat).all())
    emit(check="fused trials give equal weights as a graph and eager", equal=equal, note="")
    padding = max(trials.padding() for trials in found)
    emit(check="padded units of fused trials stay zero", equal=padding == 0.0, note=f"sum {padding:g}")


def fused_error(H: int, precision: str) -> dict[str, Any]:
    """A reverse layer over sequences of unlike length against nn.LSTM in float64: errors as shares of the largest
    element, of outputs and of gradients, and those of nn.LSTM in float32 without tf32.
    """
    from experiments import fused

    T, inputs, B, K = (4, 2, 5, 2) if CPU else (100, 9, 37, 3)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
    lstms = [nn.LSTM(inputs, H, bidirectional=True).to(DEVICE) for _ in range(K)]
    names = [f"{kind}_l0_reverse" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    stacked = [torch.stack([lstm.get_parameter(name).detach() for lstm in lstms]) for name in names]
    x, given = torch.randn(K, T, B, inputs, device=DEVICE), torch.randn(K, T, B, H, device=DEVICE)
    lengths = torch.randint(1, T + 1, (K, B))
    takes = [tensor.requires_grad_() for tensor in (x, *stacked)]
    outputs = fused.lstm(*takes, lengths.int().to(DEVICE), True, precision)
    found = [outputs, *torch.autograd.grad((outputs * given).sum(), takes)]
    torch.set_float32_matmul_precision("highest")

    def run(lstm: nn.LSTM, k: int) -> list[Tensor]:
        weights = [lstm.get_parameter(name) for name in names]
        own = x[k].detach().to(weights[0].dtype).requires_grad_()
        packed = nn.utils.rnn.pack_padded_sequence(own, lengths[k], enforce_sorted=False)
        right = nn.utils.rnn.pad_packed_sequence(lstm(packed)[0], total_length=T)[0][..., H:]
        return [right, *torch.autograd.grad((right * given[k]).sum(), [own, *weights])]

    errors: dict[str, list[float]] = {"fused": [], "torch": []}
    for k, lstm in enumerate(lstms):
        single, double = run(lstm, k), run(lstm.double(), k)
        for name, tensors in (("fused", [tensor[k] for tensor in found]), ("torch", single)):
            errors[name] += [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(tensors, double, strict=True)]
    width = len(found)
    parts = {name: (max(all[::width]), max(e for n, e in enumerate(all) if n % width)) for name, all in errors.items()}
    return {"H": H, "precision": precision, "ok": max(errors["fused"]) < TOLERANCE[precision], **parts}


class Measured:
    """One shape's variants beside the loop, until the section's time is over."""

    def __init__(self, shape: Shape, until: float) -> None:
        self.shape, self.until = shape, until
        self.loop = loop(shape)
        self.loop(0.0)

    def measure(self, variant: str, K: int, make: Callable[[], Train]) -> float:
        """Rate of a variant, 0 where it did not run: the reason is in its row."""
        if time.monotonic() > self.until:
            self.fail(variant, K, "the section's time was over")
            return 0.0
        train: Any = None
        try:
            train = make()
            train(0.0)
            rates, loops = [], []
            for _ in range(ROUNDS):
                loops.append(self.rate(self.loop, LOOP_S))
                rates.append(self.rate(train, WINDOW_S))
        except Exception as error:
            self.fail(variant, K, f"{type(error).__name__}: {str(error)[:300]}")
            return 0.0
        finally:
            if isinstance(train, Slots):
                train.close()
            del train
            release()
        emit(shape=self.shape.name, variant=variant, K=K, rates=rates, loops=loops)
        return statistics.median(rates)

    def rate(self, train: Train, window_s: float) -> float:
        seen, taken = train(time.monotonic() + window_s)
        return seen / taken

    def fail(self, variant: str, K: int, reason: str) -> None:
        emit(shape=self.shape.name, variant=variant, K=K, failed=reason)

    def climb(self, variant: str, numbers: Sequence[int], make: Callable[[int], Train]) -> int:
        """Measure for ever more trials at once, as long as it pays; the best number of them, 0 if none ran."""
        best, at = 0.0, 0
        for K in numbers:
            rate = self.measure(variant, K, lambda K=K: make(K))  # type: ignore[misc]
            if rate > best:
                pays, best, at = rate > PAYS * best, rate, K
                if pays:
                    continue
            break
        return at


def release() -> None:
    """Memory of a variant that is no longer needed. A broken context ends the section: the next has its own."""
    gc.collect()
    if CPU:
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        emit(failed="the CUDA context broke", error=str(error)[:300])
        sys.exit(3)


def guard(what: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:
        emit(check=what, failed=f"{type(error).__name__}: {str(error)[:300]}")
    release()


def measure_shape(shape: Shape, until: float) -> None:
    measured = Measured(shape, until)
    measured.measure("eager", 1, lambda: Slots(shape, 1, graphs=False))
    measured.climb("slots", SLOTS, lambda K: Slots(shape, K))
    right = {row["precision"] for row in read_rows() if row.get("H") == shape.H and row["ok"]}
    for precision in TOLERANCE:
        if precision not in right:  # never time a kernel that may be wrong
            measured.fail(f"fused {precision}", 0, "it was not found to give what nn.LSTM gives, see above")
    if "tf32" not in right:
        return
    choose_warps(measured)
    best = measured.climb("fused tf32", TRIALS, lambda K: fused_trials(shape, K, "tf32"))
    for precision in ("bf16", "ieee"):
        if best and precision in right:
            measured.measure(f"fused {precision}", best, lambda P=precision: fused_trials(shape, best, P))  # type: ignore[misc]


def choose_warps(measured: Measured) -> None:
    """The warps of a program by trying; the table in fused.py was written without a GPU."""
    from experiments import fused

    shape, plan = measured.shape, fused.plan(measured.shape.H, "tf32")
    padded, known = plan["PADDED"], plan["num_warps"]
    rates = {}
    for number in (known, 2 * known if known < 16 else 8):
        fused.WARPS[padded] = number
        variant = f"fused tf32, {number} warps"
        rates[number] = measured.measure(variant, TUNED_AT, lambda: fused_trials(shape, TUNED_AT, "tf32"))
    fused.WARPS[padded] = max(rates, key=lambda number: rates[number])


# -------------------------------------------------------------------------------------------------------- the report


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median and range."""
    median, low, high = (f"{call(values):.{digits}f}" for call in (statistics.median, min, max))
    return median if len(values) == 1 else f"{median} ({low} to {high})"


def report(rows: list[dict[str, Any]]) -> None:
    peaks: dict[str, float] = {}
    for row in rows:
        if "limits" in row:
            peaks = row["limits"]
            rates = ", ".join(f"{name} {peaks[name] / 1e12:.1f} TFLOP/s" for name in ("fp32", "tf32", "bf16"))
            print(f"{row['device']}, torch {row['torch']}, cuDNN {row['cudnn']}: products {rates}, ", end="")
            print(f"copies {peaks['copy'] / 1e12:.2f} TB/s")
    report_checks([row for row in rows if "check" in row])
    report_costs([row for row in rows if "costs" in row])
    for row in rows:
        if "beside" in row:
            print(f"{row['processes']} processes of {row['slots']} slots, {row['beside']}: {row['rate']:.0f} a second")
    for row in rows:
        if "failed" in row and "shape" not in row and "check" not in row:
            print(f"{row['failed']}: {row['error']}")
    for shape in SHAPES:
        report_shape(shape, [row for row in rows if row.get("shape") == shape.name], peaks)


def report_checks(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if "failed" in row:
            print(f"{row['check']}: FAILED, {row['failed']}")
        elif "equal" in row:
            print(f"{row['check']}: {'yes' if row['equal'] else 'NO'}" + (f" ({row['note']})" if row["note"] else ""))
        else:
            fused, right = (f"{row[name][0]:.1e} and {row[name][1]:.1e}" for name in ("fused", "torch"))
            verdict = "ok" if row["ok"] else "WRONG"
            print(f"fused against float64, H = {row['H']}, {row['precision']}: outputs and gradients ", end="")
            print(f"{fused} off, nn.LSTM in float32 {right}: {verdict}")


def report_costs(rows: list[dict[str, Any]]) -> None:
    if rows:
        print(
            "\n| shape | graphs | first and later epochs, ms: eager | captured | MiB: eager | with graphs | estimate |"
        )
        print("|" + "---|" * 7)
    for row in rows:
        times = [" and ".join(f"{time:.1f}" for time in row[name]) for name in ("eager ms", "graph ms")]
        sizes = [f"{row.get(name, 0):.0f}" for name in ("resident MiB", "graphs MiB", "estimate MiB")]
        print("| " + " | ".join([row["costs"], str(row["shapes"]), *times, *sizes]) + " |")


def report_shape(shape: Shape, rows: list[dict[str, Any]], peaks: dict[str, float]) -> None:
    done = [row for row in rows if "rates" in row]
    if not rows:
        print(f"\n{shape.name}: not measured")
        return
    print(f"\nT, F, H, L, B = {shape.name}, {shape.flops() / 1e6:.2f} MFLOP a sequence")
    print("| variant | K | sequences/s | times (a) | trials/h | us a step | share of fp32 | of tf32 |\n|" + "---|" * 8)
    loops = [rate for row in done for rate in row["loops"]]
    if loops:
        line(shape, "(a) loop", 1, loops, [1.0], peaks)
    for row in done:
        ratios = [rate / base for rate, base in zip(row["rates"], row["loops"], strict=True)]
        line(shape, row["variant"], row["K"], row["rates"], ratios, peaks)
    for row in rows:
        if "failed" in row:
            print(f"{row['variant']}, K = {row['K']}: stopped, {row['failed']}")
    verdict(shape, done)


def line(shape: Shape, name: str, K: int, rates: list[float], ratios: list[float], peaks: dict[str, float]) -> None:
    rate = statistics.median(rates)
    cells = [name, str(K), spread(rates), spread(ratios, 1), f"{rate * 3600 / N / EPOCHS:.0f}"]
    cells.append(f"{1e6 * K * shape.B / rate:.0f}")
    cells += [f"{100 * rate * shape.flops() / peaks[kind]:.2f} %" if peaks else "" for kind in ("fp32", "tf32")]
    print("| " + " | ".join(cells) + " |")


def verdict(shape: Shape, rows: list[dict[str, Any]]) -> None:
    """The best of the slots and of the fused kernel against the target."""
    for kind in ("slots", "fused"):
        found = []
        for row in rows:
            if row["variant"].startswith(kind):
                ratios = [rate / base for rate, base in zip(row["rates"], row["loops"], strict=True)]
                found.append((statistics.median(ratios), f"{row['variant']}, K = {row['K']}"))
        if not found:
            print(f"verdict, {kind}: not measured")
        elif shape.target is None:
            print("verdict, {1}: {0:.1f} times (a), no target".format(*max(found)))
        else:
            reached = "reached" if max(found)[0] >= shape.target else "MISSED"
            print("verdict, {1}: {0:.1f} times (a), target {2:g}: {3}".format(*max(found), shape.target, reached))


def section(name: str, seconds_left: float) -> None:
    prepare_process()
    until = time.monotonic() + seconds_left
    if name.startswith("shape-"):
        measure_shape(SHAPES[int(name.removeprefix("shape-"))], until)
    else:
        {"limits": limits, "costs": costs, "fused": fused, "processes": processes}[name]()


def run(name: str, limit_s: float) -> None:
    """One section in a process of its own, killed at its limit: the rows so far are kept."""
    command = [sys.executable, __file__, "--section", name, "--seconds", str(0.8 * limit_s)]
    process = subprocess.Popen([*command, *(["--cpu"] if CPU else [])], start_new_session=True)
    try:
        if process.wait(limit_s):
            emit(failed=f"section {name}", error=f"ended with status {process.returncode}")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        emit(failed=f"section {name}", error=f"killed at its limit of {limit_s:.0f} s")
    emit(section=name)


def main() -> None:
    names = ["limits", "costs", "fused", *(f"shape-{index}" for index in range(len(SHAPES))), "processes"]
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--sections", nargs="+", default=names, choices=names, metavar="SECTION", help=", ".join(names)
    )
    options.add_argument("--minutes", type=float, default=9.0, help="no section begins that could end later")
    options.add_argument("--go-on", action="store_true", help="only what the rows of an earlier call lack")
    options.add_argument("--cpu", action="store_true", help="a dry run at tiny sizes")
    options.add_argument("--section", help=argparse.SUPPRESS)
    options.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options.add_argument("--beside", nargs=3, type=float, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.beside:
        prepare_process()
        beside(int(given.beside[0]), *given.beside[1:])
        return
    if given.section:
        section(given.section, given.seconds)
        return
    if not CPU and not torch.cuda.is_available():
        print("no CUDA device: nothing to measure (--cpu is a dry run of the logic)")
        return
    if CPU:
        os.environ["TRITON_INTERPRET"] = "1"
    began = time.monotonic()
    if not given.go_on:
        OUT.write_text("")
    done = {row["section"] for row in read_rows() if "section" in row}
    left = [name for name in given.sections if name not in done]
    while left and time.monotonic() - began + SECTION_S[kind(left[0])] < 60 * given.minutes:
        name = left.pop(0)
        run(name, SECTION_S[kind(name)])
    report(read_rows())
    print(f"\n{time.monotonic() - began:.0f} s in all; rows in {OUT}")
    if left:
        print(f"left for a call with --go-on: {', '.join(left)}")


def kind(section: str) -> str:
    return section.partition("-")[0]


if __name__ == "__main__":
    main()
