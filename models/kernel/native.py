"""Training on a CPU in native code: the C files beside this one, compiled for the machine at first use.

`Kernel.network_train` and `.network_predict` run whole networks (see network.h), `Kernel.layer` a single LSTM layer
under torch's autograd.

Letters: S steps, B sequences, F inputs, H hidden size, D directions (1 or 2).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hpo.errors import HpoError
from hpo.models.files import whole_file
from hpo.models.kernel.structs import (
    Data,
    LstmGradients,
    LstmInputs,
    LstmShape,
    Network,
    NetworkBatches,
    TrainingSettings,
)

if sys.platform != "win32":
    import grp
    import pwd

log = logging.getLogger("hpo")

SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".c", ".h"))
COMPILERS = ("cc", "gcc", "clang")  # after the one that CC names
COMPILE_TIMEOUT_S = 120
ARM = platform.machine().lower() in ("arm64", "aarch64")
# Tuned for processors in general: GCC's tuning for some AVX2 ones makes the kernel a fifth slower. Not -ffast-math: a
# diverging training must show as NaN or infinity.
MACHINE = ("-mcpu=native",) if ARM else ("-march=native", "-mtune=generic")
ARITHMETIC = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
FLAGS = ("-std=gnu11", "-O3", *MACHINE, *ARITHMETIC, "-shared", "-fPIC")
LARGEST = 256  # hidden size up to which it is the faster one; at 512 torch is as fast, at 1024 some 1.1 times faster
MEASURED = ((50, 16, 1, 16), (50, 16, 8, 64))  # S, B, F, H that widths are compared at
MEASUREMENTS = 20  # of each
TOLERANCE = 1e-4  # of a fresh build compared with torch: any wrong sum is far off, rounding far below


class NativeError(HpoError):
    """The kernel cannot be built here, or does not take what it was given."""


class Kernel:
    """The compiled kernel. Any number of threads may call it at once; each call runs in the calling thread alone."""

    def __init__(self, library: Path, name: str) -> None:
        """Raises NativeError where the library cannot be loaded."""
        self.name = name  # of its source, compiler, flags and processor: same name and input, same bits
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        try:
            loaded = ctypes.CDLL(str(library))
        except OSError as error:
            raise NativeError(f"the compiled kernel cannot be loaded: {error}") from None

        def function(name: str, result: Any, *given: Any) -> Callable[..., Any]:
            found = getattr(loaded, name)
            found.restype, found.argtypes = result, given
            return cast(Callable[..., Any], found)

        shape, network, data, batches = map(ctypes.POINTER, (LstmShape, Network, Data, NetworkBatches))
        self.lstm_bytes = function("lstm_bytes", integer, shape)
        self.lstm_forward = function("lstm_forward", integer, shape, ctypes.POINTER(LstmInputs), pointer, pointer)
        self.lstm_backward = function("lstm_backward", None, shape, ctypes.POINTER(LstmGradients), pointer)
        self.network_bytes = function("network_bytes", integer, network, integer, integer, integer)
        settings = ctypes.POINTER(TrainingSettings)
        self.network_train = function("network_train", integer, network, data, settings, batches, pointer, pointer)
        self.network_predict = function("network_predict", None, network, data, batches, pointer, pointer)

    def layer(self, inputs: Tensor, lengths: Tensor | None, *weights: Tensor, final: bool = False) -> Tensor:
        """One LSTM layer from a zero state: (S, B, F) and lengths (B,) int64 to (S, B, D*H), zero beyond each length.

        weights: weight_ih, weight_hh, bias_ih, bias_hh as in nn.LSTM, then those of the reverse direction if there is
        one, which runs over each sequence backwards within its own length. lengths None: all are S. What `inputs`
        holds beyond a length is never read, and its gradient is zero. final: instead of all outputs those that each
        direction ends a sequence with, (B, D*H); zero for a sequence of length 0. All float32 on a CPU.

        Raises NativeError for other types, devices or shapes, and for a length that is not in 0..S.
        """
        inputs, lengths = inputs.contiguous(), None if lengths is None else lengths.contiguous()
        weights = tuple(weight.contiguous() for weight in weights)
        _check(inputs, lengths, weights)
        if torch.is_grad_enabled():
            return cast(Tensor, _Layer.apply(self, final, inputs, lengths, *weights))  # type: ignore[no-untyped-call]
        return _forward(self, final, inputs, lengths, weights, training=False)[0]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, final: bool, inputs: Tensor, lengths: Tensor | None, *weights: Tensor
    ) -> Tensor:
        outputs, memories = _forward(kernel, final, inputs, lengths, weights, training=True)
        ctx.kernel, ctx.final, ctx.shape, ctx.lengths = kernel, final, inputs.shape, lengths
        ctx.save_for_backward(*memories, *weights)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (S, B, F), directions, lengths = ctx.shape, len(ctx.saved_tensors) // 5, ctx.lengths
        memories, weights = ctx.saved_tensors[:directions], ctx.saved_tensors[directions:]
        if gradient.stride(-1) != 1:
            gradient = gradient.contiguous()
        inputs = gradient.new_empty(S, B, F) if ctx.needs_input_grad[2] else None
        gradients = [torch.empty_like(weight) for weight in weights]
        for reverse, memory in enumerate(memories):
            own = slice(4 * reverse, 4 * reverse + 4)
            weight_ih, weight_hh, _, _ = weights[own]
            H = weight_hh.shape[1]
            shape = LstmShape(S, B, F, H, reverse, True, ctx.final, gradient.stride(0), gradient.stride(-2))
            arguments = LstmGradients(
                *(gradient.data_ptr() + 4 * reverse * H, weight_ih.data_ptr(), weight_hh.data_ptr()),
                *(None if inputs is None else inputs.data_ptr(), B * F, F, reverse),
                None if lengths is None else lengths.data_ptr(),
                *(tensor.data_ptr() for tensor in gradients[own]),
            )
            ctx.kernel.lstm_backward(shape, arguments, memory.data_ptr())
        return None, None, inputs, None, *gradients


def _forward(
    kernel: Kernel, final: bool, inputs: Tensor, lengths: Tensor | None, weights: tuple[Tensor, ...], *, training: bool
) -> tuple[Tensor, list[Tensor]]:
    """The outputs and, for each direction, the memory that its backward pass reads."""
    (S, B, F), H, directions = inputs.shape, weights[1].shape[1], len(weights) // 4
    outputs = torch.empty((B, directions * H) if final else (S, B, directions * H))
    memories = []
    for reverse in range(directions):
        shape = LstmShape(S, B, F, H, reverse, training, final, B * directions * H, directions * H)
        memory = torch.empty(kernel.lstm_bytes(shape), dtype=torch.uint8)
        arguments = LstmInputs(
            *(inputs.data_ptr(), B * F, F, None, None if lengths is None else lengths.data_ptr()),
            *(weight.data_ptr() for weight in weights[4 * reverse : 4 * reverse + 4]),
        )
        wrong = kernel.lstm_forward(shape, arguments, outputs.data_ptr() + 4 * reverse * H, memory.data_ptr())
        if wrong:
            raise NativeError(f"a length must be from 0 to the number of steps, {S}, got {cast(Tensor, lengths)}")
        memories.append(memory)
    return outputs, memories


def _check(inputs: Tensor, lengths: Tensor | None, weights: tuple[Tensor, ...]) -> None:
    """Raise NativeError for what would make the kernel read beyond the end of a tensor."""
    tensors = (inputs, *weights)
    if any(tensor.dtype is not torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        found = sorted({f"{tensor.dtype} on {tensor.device}" for tensor in tensors})
        raise NativeError(f"the native LSTM takes float32 on a CPU, got {', '.join(found)}")
    H, F = weights[1].shape[-1], inputs.shape[-1]
    shapes = [tuple(weight.shape) for weight in weights]
    if inputs.dim() != 3 or shapes not in ([(4 * H, F), (4 * H, H), (4 * H,), (4 * H,)] * count for count in (1, 2)):
        raise NativeError(f"inputs {tuple(inputs.shape)} and weights {shapes} are not those of one LSTM layer")
    if lengths is not None and (lengths.dtype is not torch.int64 or tuple(lengths.shape) != (inputs.shape[1],)):
        raise NativeError(f"lengths must be {inputs.shape[1]} of int64, got {tuple(lengths.shape)} of {lengths.dtype}")


@functools.cache
def load(*folders: Path) -> Kernel | None:
    """The kernel, from the first of the folders that is this user's alone, or compiled into it; None, with the reason
    logged, where that cannot be done. Where no folder is, it is compiled for this process only.

    A build takes about a second, once for each machine, compiler and version of the source. The file appears whole or
    not at all, and only after the kernel's outputs and gradients were compared with torch's. One that is not what was
    compiled is compiled again.
    """
    try:
        folder = _private_folder(folders)
        if folder is not None:
            return _build(folder)
        with tempfile.TemporaryDirectory() as scratch:  # a library stays loaded when its file is gone
            return _build(Path(scratch))
    except NativeError as error:
        log.info("LSTMs run on torch's kernels: %s", error)
        return None


def _private_folder(folders: tuple[Path, ...]) -> Path | None:
    """The first folder, made if need be, that nobody else can write to: a library's code runs as this user.

    Raises NativeError where it cannot be made.
    """
    for folder in folders:
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)
            real = folder.resolve()
            others = next((path for path in (real, *real.parents) if not _is_own(path, path != real)), None)
        except OSError as error:
            raise NativeError(f"the kernel cannot be kept in {folder}: {error.strerror}") from None
        if others is None:
            return real
        log.debug("no kernel is kept in %s or loaded from it: another user owns %s or may write to it", folder, others)
    return None


def _is_own(path: Path, parent: bool = False) -> bool:
    """Whether only this user and root can change what lies at the path; in a sticky parent that is so, too."""
    if sys.platform == "win32":
        return True  # no kernel is built there
    about = path.stat()
    if about.st_uid not in (0, os.geteuid()):
        return False
    if parent and about.st_mode & stat.S_ISVTX:
        return True
    return not about.st_mode & stat.S_IWOTH and (not about.st_mode & stat.S_IWGRP or _is_private(about.st_gid))


def _is_private(gid: int) -> bool:
    """Whether the group is root's or this user's own, without other members."""
    if sys.platform == "win32":
        return False
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return gid == 0
    return group.gr_name in ("root", user) and set(group.gr_mem) <= {"root", user}


def _build(folder: Path) -> Kernel:
    compiler = _compiler()
    version = _run([*compiler, "--version"])
    parts = (*(path.read_text() for path in SOURCES), shlex.join([*compiler, *FLAGS]), version, _processor())
    name = "native-" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = folder / f"{name}.so"
    if _is_whole(library):
        return Kernel(library, name)
    try:
        with whole_file(library) as beside:
            _compile_fastest(compiler, beside, _widths())
            _compare(Kernel(beside, name))
            beside.chmod(0o700)
            with beside.open("ab") as file:  # after the end of a library comes what the loader does not read
                file.write(hashlib.sha256(beside.read_bytes()).digest())
    except OSError as error:
        raise NativeError(f"the kernel cannot be kept in {folder}: {error.strerror}") from None
    if not _is_whole(library):
        raise NativeError(f"{library} is not what was compiled: {folder} does not keep what is written to it")
    return Kernel(library, name)


def _widths() -> tuple[int, ...]:
    """Numbers of a vector, of those widths among which it depends on the core which is the fastest; 0: the widest. Some
    cores execute an instruction of AVX-512 in two halves."""
    return (16, 8) if " avx512f " in f"{_processor()} ".replace("\n", " ") else (0,)


def _compile_fastest(compiler: list[str], library: Path, widths: Sequence[int]) -> None:
    """Compile for each of the widths, and keep what is fastest on this core. All give the same bits."""
    if len(widths) == 1:
        _compile(compiler, library, widths[0])
        return
    built = {width: library.with_name(f"{library.name}-{width}") for width in widths}
    try:
        for width, path in built.items():
            _compile(compiler, path, width)
        fastest = _fastest({width: Kernel(path, str(width)) for width, path in built.items()})
        built[fastest].replace(library)
    finally:
        for path in built.values():
            path.unlink(missing_ok=True)


def _compile(compiler: list[str], library: Path, width: int) -> None:
    lanes = [f"-DLANES={width}"] if width else []
    sources = [str(path) for path in SOURCES if path.suffix == ".c"]
    _run([*compiler, *FLAGS, *lanes, *sources, "-lm", "-o", str(library)])


@torch.inference_mode(False)
@torch.enable_grad()
def _fastest(kernels: Mapping[int, Kernel]) -> int:
    """The width whose training steps of a small and of a middling layer take the least time, one as important as the
    other."""
    shares = dict.fromkeys(kernels, 0.0)
    for S, B, F, H in MEASURED:
        inputs, weights = torch.zeros(S, B, F), _random_weights(F, H)
        times: dict[int, list[float]] = {width: [] for width in kernels}
        for _ in range(MEASUREMENTS):  # in turns: others may use the core
            for width, kernel in kernels.items():
                began = time.perf_counter()
                kernel.layer(inputs, None, *weights, final=True).sum().backward()  # type: ignore[no-untyped-call]
                times[width].append(time.perf_counter() - began)
        least = {width: min(each) for width, each in times.items()}
        for width in kernels:
            shares[width] += least[width] / min(least.values())
    return min(shares, key=shares.__getitem__)


def _is_whole(library: Path) -> bool:
    """Whether the file is a library that this user compiled, with its SHA-256 at the end."""
    try:
        content = library.read_bytes()
        own = not library.is_symlink() and _is_own(library)
    except OSError:
        return False
    return own and hashlib.sha256(content[:-32]).digest() == content[-32:]


def _compiler() -> list[str]:
    if os.name != "posix":
        raise NativeError("the native LSTM is built on POSIX systems only")
    if named := shlex.split(os.environ.get("CC", "")):
        return named
    found = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if found is None:
        raise NativeError(f"no C compiler found (CC, {', '.join(COMPILERS)}); install one to train faster")
    return [found]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"`{shlex.join(command)}` failed: {error}") from None
    if done.returncode:
        raise NativeError(f"`{shlex.join(command)}` failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def _processor() -> str:
    """What the kernel is compiled for: the processor's name and features."""
    keys = ("model name", "flags", "CPU implementer", "CPU part", "CPU variant", "Features")
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return platform.machine() + "\n".join(line for line in first.splitlines() if line.startswith(keys))


def _random_weights(F: int, H: int) -> list[Tensor]:
    """Those of one direction of a layer."""
    random = torch.Generator().manual_seed(0)
    shapes = [(4 * H, F), (4 * H, H), (4 * H,), (4 * H,)]
    return [torch.randn(shape, generator=random).div_(H**0.5).requires_grad_() for shape in shapes]


@torch.inference_mode(False)
@torch.enable_grad()
def _compare(kernel: Kernel) -> None:
    """Compare a fresh build with torch on a ragged batch: nothing is known of the compiler or the processor.

    Raises NativeError.
    """
    random = torch.Generator().manual_seed(0)
    S, B, F, H = 7, 9, 3, 19
    inputs = torch.randn(S, B, F, generator=random)
    weights = _random_weights(F, H)
    lengths = torch.randint(1, S + 1, (B,), generator=random)
    inside = torch.arange(S)[:, None, None] < lengths[:, None]
    zeros = torch.zeros(1, B, H)
    expected = torch.where(inside, torch.lstm(inputs, (zeros, zeros), weights, True, 1, 0.0, True, False, False)[0], 0)
    outputs = kernel.layer(inputs, lengths, *weights)
    pairs = [(outputs, expected)]
    pairs += zip(torch.autograd.grad(outputs.sum(), weights), torch.autograd.grad(expected.sum(), weights), strict=True)
    off = max(float((own - torchs).detach().abs().max() / torchs.detach().abs().max()) for own, torchs in pairs)
    if not off <= TOLERANCE:
        raise NativeError(f"the compiled kernel differs from torch by {off:.1e}")
