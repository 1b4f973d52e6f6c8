"""The native LSTM layer is nn.LSTM's: held against it in float64, over lengths, directions and shapes."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hpo.models.kernel import native
from hpo.models.kernel.native import Kernel, NativeError

# How much farther from float64 than torch's float32 it may be, by the largest error of a tensor. Both add the same
# products in orders of their own and round each gate to some units in the last place, so their errors are alike in
# size: the largest ratio over 2,044 random shapes was 5.0. What one rounding of the largest element explains is no
# error, so torch's counts as that much at least.
FARTHER = 8.0
ONE_ROUNDING = 2.0**-23
Change = Callable[[Tensor, Tensor, list[Tensor]], tuple[Tensor, Tensor, list[Tensor]]]
NAMES = ("outputs", "inputs", *("weight_ih", "weight_hh", "bias_ih", "bias_hh") * 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Kernel:
    if not any(map(shutil.which, native.COMPILERS)):
        pytest.skip("there is no C compiler on this machine")
    built = native.load(folder)
    assert built is not None
    return built


def layer(S: int, B: int, F: int, H: int, directions: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Inputs (S, B, F) and weights as torch initialises them; all want gradients."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(4 * H, F), (4 * H, H), (4 * H,), (4 * H,)] * directions
    weights = [(torch.rand(shape, generator=random) * 2 - 1) * H**-0.5 for shape in shapes]
    return torch.randn(S, B, F, generator=random).requires_grad_(), [weight.requires_grad_() for weight in weights]


def torchs(inputs: Tensor, lengths: Tensor, weights: list[Tensor]) -> Tensor:
    """The layer by torch, sequences of one length at a time and without padding."""
    S, B, _ = inputs.shape
    both, H = len(weights) == 8, weights[1].shape[1]
    outputs = inputs.new_zeros(S, B, 2 * H if both else H)
    for length in sorted(set(lengths.tolist())):
        rows = (lengths == length).nonzero()[:, 0]
        zeros = inputs.new_zeros(2 if both else 1, len(rows), H)
        part = torch.lstm(inputs[:length, rows], (zeros, zeros), weights, True, 1, 0.0, True, both, False)[0]
        outputs = outputs.index_copy(1, rows, nn.functional.pad(part, (0, 0, 0, 0, 0, S - length)))
    return outputs


def results(outputs: Tensor, dy: Tensor, inputs: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """The outputs and the gradients of inputs and weights."""
    return [outputs, *torch.autograd.grad(outputs, [inputs, *weights], dy)]


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int, list[int]]:
    """S, B, F, H and the lengths that occur."""
    S, B = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    return S, B, draw(st.integers(1, 40)), draw(st.integers(1, 130)), draw(st.lists(st.integers(1, S), max_size=3))


def holds(kernel: Kernel, shape: tuple[int, int, int, int, list[int]], directions: int, seed: int) -> None:
    S, B, F, H, levels = shape
    random = torch.Generator().manual_seed(seed)
    inputs, weights = layer(S, B, F, H, directions, seed)
    dy = torch.randn(S, B, directions * H, generator=random)
    lengths = torch.tensor(levels or [S])[torch.randint(len(levels) or 1, (B,), generator=random)]
    wide = [tensor.detach().double().requires_grad_() for tensor in (inputs, *weights)]
    exact = results(torchs(wide[0], lengths, wide[1:]), dy.double(), wide[0], wide[1:])
    theirs = results(torchs(inputs, lengths, weights), dy, inputs, weights)
    ours = results(kernel.layer(inputs, lengths if levels else None, *weights), dy, inputs, weights)
    for name, right, their, our in zip(NAMES, exact, theirs, ours, strict=False):
        allowed = max((their - right).abs().max(), ONE_ROUNDING * right.abs().max())
        assert (our - right).abs().max() <= FARTHER * allowed, (name, shape, directions)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes(), st.integers(1, 2), st.integers(0, 999))
def test_any_shape(kernel: Kernel, shape: tuple[int, int, int, int, list[int]], directions: int, seed: int) -> None:
    holds(kernel, shape, directions, seed)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("H", [1, 7, 16, 17, 64, 80, 96, 112, 130])
def test_every_way_that_units_fill_vectors(kernel: Kernel, H: int, directions: int) -> None:
    holds(kernel, (5, 11, 3, H, [2, 5]), directions, H)


@pytest.mark.parametrize("B", [*range(1, 14), 150])
def test_every_way_that_sequences_fill_registers(kernel: Kernel, B: int) -> None:
    holds(kernel, (4, B, 33, 20, [1, 2, 4]), 2, B)


def test_memory_at_any_address(kernel: Kernel) -> None:
    """Weights lie side by side in one buffer, inputs may be a part of a larger tensor."""
    inputs, weights = layer(6, 5, 3, 17, 1)
    buffer = torch.zeros(1 + sum(weight.numel() for weight in weights))
    aside, at = [], 1
    for weight in weights:
        aside.append(buffer[at : at + weight.numel()].view(weight.shape))
        aside[-1].copy_(weight.detach())
        at += weight.numel()
    moved = torch.zeros(1 + inputs.numel())[1:].view(inputs.shape).copy_(inputs.detach())
    assert moved.data_ptr() % 64
    assert aside[0].data_ptr() % 64
    assert torch.equal(kernel.layer(moved, None, *aside), kernel.layer(inputs, None, *weights))
    assert torch.equal(
        kernel.layer(moved.transpose(0, 1).contiguous().transpose(0, 1), None, *aside),
        kernel.layer(inputs, None, *weights),
    )


def test_gradients_of_any_stride(kernel: Kernel) -> None:
    inputs, weights = layer(6, 5, 3, 8, 2)
    dense = torch.randn(16, 5, 6).permute(2, 1, 0)
    for dy in (dense, torch.randn(1, 5, 16).expand(6, -1, -1), torch.randn(6, 1, 1).expand(-1, 5, 16)):
        outputs = kernel.layer(inputs, None, *weights)
        strided = results(outputs, dy, inputs, weights)
        plain = results(kernel.layer(inputs, None, *weights), dy.contiguous(), inputs, weights)
        assert all(map(torch.equal, strided, plain))


@pytest.mark.parametrize("directions", [1, 2])
def test_padding_never_changes_an_answer(kernel: Kernel, directions: int) -> None:
    """Whatever stands beyond a length, however long the padding: the same bits, no gradient, zero outputs."""
    inputs, weights = layer(9, 6, 3, 20, directions)
    lengths = torch.tensor([4, 9, 1, 9, 6, 0])
    outside = (torch.arange(9)[:, None] >= lengths)[:, :, None]
    dy = torch.randn(9, 6, directions * 20)
    clean = results(kernel.layer(inputs, lengths, *weights), dy, inputs, weights)
    dirty = inputs.detach().masked_fill(outside, torch.nan)
    longer = torch.cat([dirty, torch.full((5, 6, 3), torch.inf)]).requires_grad_()
    dy = torch.cat([dy.masked_fill(outside, torch.nan), torch.full((5, 6, directions * 20), torch.nan)])
    padded = results(kernel.layer(longer, lengths, *weights), dy, longer, weights)
    for short, long in zip(clean[:2], padded[:2], strict=True):
        assert torch.equal(short, long[:9])
        assert not short.masked_select(outside).any()
        assert not long[9:].any()
    assert all(map(torch.equal, clean[2:], padded[2:]))


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("lengths", [None, [4, 9, 1, 9, 6, 0]])
def test_final_outputs_are_those_that_sequences_end_with(
    kernel: Kernel, lengths: list[int] | None, directions: int
) -> None:
    inputs, weights = layer(9, 6, 3, 20, directions)
    many = None if lengths is None else torch.tensor(lengths)
    last = torch.full((6,), 8) if many is None else (many - 1).clamp(min=0)
    dy = torch.randn(6, directions * 20)
    everything = kernel.layer(inputs, many, *weights)
    forward = everything.gather(0, last[None, :, None].expand(1, -1, 20))[0]
    expected = results(torch.cat([forward, everything[0, :, 20:]], 1), dy, inputs, weights)
    final = results(kernel.layer(inputs, many, *weights, final=True), dy, inputs, weights)
    assert all(map(torch.equal, final, expected))
    with torch.no_grad():
        assert torch.equal(kernel.layer(inputs, many, *weights, final=True), expected[0])


@pytest.mark.parametrize("directions", [1, 2])
def test_a_sequence_has_the_same_bits_in_every_batch(kernel: Kernel, directions: int) -> None:
    inputs, weights = layer(8, 40, 5, 33, directions)
    lengths = torch.randint(1, 9, (40,), generator=torch.Generator().manual_seed(1))
    dy = torch.randn(8, 40, directions * 33)
    together = results(kernel.layer(inputs, lengths, *weights), dy, inputs, weights)
    for rows in ([7], [3, 7], [39, 7, 2, 11, 30], list(range(30))):
        part = inputs[:, rows].detach().requires_grad_()
        apart = results(kernel.layer(part, lengths[rows], *weights), dy[:, rows], part, weights)
        assert torch.equal(together[0][:, rows], apart[0])
        assert torch.equal(together[1][:, rows], apart[1])


def test_the_same_bits_every_time_and_without_gradients(kernel: Kernel) -> None:
    inputs, weights = layer(30, 17, 5, 40, 2)
    lengths = torch.randint(1, 31, (17,), generator=torch.Generator().manual_seed(1))
    dy = torch.randn(30, 17, 80)
    first = results(kernel.layer(inputs, lengths, *weights), dy, inputs, weights)
    again = results(kernel.layer(inputs, lengths, *weights), dy, inputs, weights)
    assert all(map(torch.equal, first, again))
    with torch.inference_mode():
        assert torch.equal(kernel.layer(inputs, lengths, *weights), first[0])


def test_threads_do_not_meet(kernel: Kernel) -> None:
    inputs, weights = layer(60, 20, 5, 40, 2)
    dy = torch.randn(60, 20, 80)

    def run(_: int) -> list[Tensor]:
        return results(kernel.layer(inputs, None, *weights), dy, inputs, weights)

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(run, range(12))
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


def test_two_backward_passes_and_weights_that_stand_still(kernel: Kernel) -> None:
    inputs, weights = layer(5, 4, 3, 8, 2)
    outputs = kernel.layer(inputs, None, *weights)
    dy = torch.randn(5, 4, 16)
    first = torch.autograd.grad(outputs, [inputs, *weights], dy, retain_graph=True)
    second = torch.autograd.grad(outputs, [inputs, *weights], dy, retain_graph=True)
    assert all(map(torch.equal, first, second))
    assert torch.autograd.grad(outputs, weights[:1], dy, retain_graph=True)[0].equal(first[1])
    frozen = kernel.layer(inputs.detach(), None, *weights)  # the first layer of a network
    assert all(map(torch.equal, torch.autograd.grad(frozen, weights, dy), first[1:]))
    with torch.no_grad():
        weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs, weights, dy)


@pytest.mark.parametrize("H", [12, 16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_as_in_torch(kernel: Kernel, bad: float, H: int) -> None:
    inputs, weights = layer(6, 5, 2, H, 1)
    lengths = torch.full((5,), 6)
    for tensor, place in ((inputs, (2, 3, 1)), (weights[1], (0, 0)), (weights[3], (H,))):
        before = tensor.detach().clone()
        with torch.no_grad():
            tensor[place] = bad
        dy = torch.randn(6, 5, H, generator=torch.Generator().manual_seed(0))
        ours = results(kernel.layer(inputs, None, *weights), dy, inputs, weights)
        theirs = results(torchs(inputs, lengths, weights), dy, inputs, weights)
        for name, our, their in zip(NAMES, ours, theirs, strict=False):
            assert our.isfinite().equal(their.isfinite()), (name, place)
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=0, equal_nan=True)
        with torch.no_grad():
            tensor.copy_(before)


def test_large_gates_saturate(kernel: Kernel) -> None:
    inputs, weights = layer(4, 3, 2, 16, 1)
    for scale in (1e2, 1e4, 1e30):
        own = kernel.layer(inputs * scale, None, *weights)
        torch.testing.assert_close(own, torchs(inputs * scale, torch.full((3,), 4), weights), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, n, w: (x.double(), n, w), "takes float32 on a CPU, got torch.float32 on cpu, torch.float64 on cpu"),
        (lambda x, n, w: (x[:, :, :2], n, w), "are not those of one LSTM layer"),
        (lambda x, n, w: (x, n, w[:3]), "are not those of one LSTM layer"),
        (lambda x, n, w: (x, n, w * 3), "are not those of one LSTM layer"),
        (lambda x, n, w: (x, n[:4], w), r"lengths must be 5 of int64, got \(4,\) of torch.int64"),
        (lambda x, n, w: (x, n.int(), w), r"lengths must be 5 of int64, got \(5,\) of torch.int32"),
        (lambda x, n, w: (x, n + 4, w), "a length must be from 0 to the number of steps, 6, got"),
        (lambda x, n, w: (x, n - 4, w), "a length must be from 0 to the number of steps, 6, got"),
    ],
)
def test_what_it_cannot_take_is_refused(kernel: Kernel, change: Change, message: str) -> None:
    inputs, weights = layer(6, 5, 3, 8, 1)
    inputs, lengths, weights = change(inputs, torch.tensor([1, 2, 3, 3, 3]), weights)
    with pytest.raises(NativeError, match=message):
        kernel.layer(inputs, lengths, *weights)


def test_two_processes_build_it_at_once(kernel: Kernel, tmp_path: Path) -> None:
    load = f"native.load(Path({str(tmp_path)!r}))"
    code = f"from pathlib import Path; from hpo.models.kernel import native; print({load}.name)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names = [process.communicate()[0].strip() for process in processes]
    assert names == [kernel.name] * 2
    assert [path.name for path in tmp_path.iterdir()] == [f"{kernel.name}.so"]


def test_a_build_is_kept(kernel: Kernel, folder: Path) -> None:
    built = (folder / f"{kernel.name}.so").stat()
    native.load.cache_clear()
    again = native.load(folder)
    assert again is not None
    assert again.name == kernel.name
    assert (folder / f"{kernel.name}.so").stat() == built


COMPILERS = {
    "none": ("/no/such/compiler", "`/no/such/compiler --version` failed"),
    "failing": ("#!/bin/sh\ntest $1 = --version || { echo no space left >&2; exit 1; }", "failed: no space left"),
    "silent": ("#!/bin/sh", "the compiled kernel cannot be loaded"),
    "wrong": (
        """#!/bin/sh
for word; do
    case $word in
        *lstm.c) sed "s/vec_tanh/vec_sigmoid/" "$word" > "$0.c"; set -- "$@" -I"${word%/*}" "$0.c";;
        *) set -- "$@" "$word";;
    esac
    shift
done
exec cc "$@" """,
        "the compiled kernel differs from torch by",
    ),
}


@pytest.mark.parametrize("kind", COMPILERS)
@pytest.mark.usefixtures("kernel")
def test_without_a_compiler_that_works_there_is_no_kernel(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler, reason = COMPILERS[kind]
    if compiler.startswith("#!"):
        (tmp_path / "cc").write_text(compiler)
        (tmp_path / "cc").chmod(0o755)
        compiler = str(tmp_path / "cc")
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.INFO, "hpo"):
        assert native.load(tmp_path / "kernels") is None
    assert "LSTMs run on torch's kernels: " in caplog.text
    assert reason in caplog.text
    assert not list((tmp_path / "kernels").glob("*"))


def test_no_compiler_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO, "hpo"):
        assert native.load(tmp_path / "kernels") is None
    assert "no C compiler found (CC, cc, gcc, clang); install one" in caplog.text


def test_a_folder_that_cannot_be(kernel: Kernel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.INFO, "hpo"):
        assert native.load(tmp_path / "file" / "kernels") is None
    assert f"the kernel cannot be kept in {tmp_path / 'file' / 'kernels'}: Not a directory" in caplog.text


@pytest.mark.parametrize("spoiled", ["folder", "parent", "library", "link"])
def test_what_others_may_write_to_is_not_loaded(
    kernel: Kernel, folder: Path, tmp_path: Path, spoiled: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As sshd's StrictModes asks it of keys: whoever can write to the library runs code as this user."""
    shared, own = tmp_path / "shared" / "hpo-native", tmp_path / "own"
    shared.mkdir(0o700, parents=True)
    library = shared / f"{kernel.name}.so"
    shutil.copy(folder / library.name, library)
    if spoiled == "link":
        library.rename(tmp_path / "elsewhere.so")
        library.symlink_to(tmp_path / "elsewhere.so")
    else:
        {"folder": shared, "parent": shared.parent, "library": library}[spoiled].chmod(0o777)
    content = library.read_bytes()
    with caplog.at_level(logging.DEBUG, "hpo"):
        loaded = native.load(shared, own)
    assert loaded is not None
    assert loaded.name == kernel.name
    if spoiled in ("folder", "parent"):
        assert [path.name for path in own.iterdir()] == [library.name]
        assert f"no kernel is kept in {shared} or loaded from it: another user owns" in caplog.text
        assert library.read_bytes() == content
    else:
        assert not own.exists()
        assert not library.is_symlink()
        assert stat.S_IMODE(library.stat().st_mode) == 0o700  # compiled anew


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_another_users_folder_is_left_alone_and_the_kernel_compiled_for_the_process(
    kernel: Kernel, folder: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(folder, theirs)
    os.chown(theirs, 65534, 65534)
    before = [path.stat() for path in theirs.iterdir()]
    loaded = native.load(theirs)
    assert loaded is not None
    assert loaded.name == kernel.name
    assert [path.stat() for path in theirs.iterdir()] == before


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_damaged_library_is_compiled_again(kernel: Kernel, folder: Path, tmp_path: Path, damage: str) -> None:
    content = (folder / f"{kernel.name}.so").read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    library = tmp_path / f"{kernel.name}.so"
    library.write_bytes({"torn": content[:middle], "flipped": flipped, "empty": b""}[damage])
    library.chmod(0o700)
    loaded = native.load(tmp_path)
    assert loaded is not None
    assert library.read_bytes() == content
