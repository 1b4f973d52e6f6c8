"""K LSTM trials of like shape trained as one: a Triton prototype, held against nn.LSTM in tests/test_fused.py.

One program a (trial, tile of sequences) runs all time steps of a layer with the trial's recurrent weights on chip; the
input projection and the gradients of the weights are batched matmuls outside. Trials have weights, hidden sizes,
learning rates and lengths of their own. A smaller hidden size is padded with zeros to the common one, and the padded
units stay exactly zero: their cell is c = 0.5*0 + 0.5*tanh(0), and whatever reads them reads them with zero weights.

Letters: K trials, T steps, B sequences in a batch, I inputs of a layer, H common hidden size, L layers, D directions,
N sequences in the data, F features, P parameters of a trial, rounded up. Gates in nn.LSTM's order i, f, g, o.

    python experiments/fused.py [--hidden 16 64 256] [--precision tf32 bf16]

compiles the kernels for a Hopper GPU, without one, and prints what they take. Triton 3.6 to 3.8 compile all of them;
3.9.0 dies of an assertion in LLVM's SLP vectoriser on the smallest ieee one.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

PRECISIONS = ("ieee", "tf32", "bf16")  # of the products; sums, states and gates are always float32
TILE = 16  # sequences of a program: the fewest rows that a tensor core takes
CHUNK = 16  # units whose recurrent weights are read at a time, where all of them do not fit on the chip
WARPS = {16: 1, 32: 2, 64: 4, 128: 8}  # of a program, by padded hidden size; above: 16
ALIGNED = 16  # floats that trials' weights and units are rounded up to, so that a GPU reads them in whole vectors
BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch.optim.AdamW's defaults


class FusedError(ValueError):
    """The trials or tensors do not fit one fused kernel."""


# ---- kernels


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x):
    """tanh by one exponential; exactly 0 at 0, as padded units need it."""
    small = tl.exp(-2 * tl.abs(x))
    size = (1 - small) / (1 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, summed in float32."""
    if PRECISION == "bf16":
        total = tl.dot(a.to(tl.bfloat16), b, total)
    elif PRECISION == "rounded":  # what bf16 becomes in Triton's interpreter, whose products know no bfloat16
        total = tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.float32), total)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def _load4(pointer, stride, mask):
    """The same block of all four gates, `stride` elements apart."""
    i = tl.load(pointer, mask=mask, other=0.0)
    f = tl.load(pointer + stride, mask=mask, other=0.0)
    g = tl.load(pointer + 2 * stride, mask=mask, other=0.0)
    o = tl.load(pointer + 3 * stride, mask=mask, other=0.0)
    return i, f, g, o


@triton.jit
def _store4(pointer, stride, i, f, g, o, mask):
    tl.store(pointer, i, mask=mask)
    tl.store(pointer + stride, f, mask=mask)
    tl.store(pointer + 2 * stride, g, mask=mask)
    tl.store(pointer + 3 * stride, o, mask=mask)


@triton.jit
def _forward_kernel(
    gates,  # (K, T, B, 4H) in: the input projection with both biases; out: the activated gates
    weights,  # (K, 4H, H) float32 or bfloat16, trials `weight_stride` elements apart
    lengths,  # (K, B) int32
    outputs,  # (K, T, B, H) out, zero outside a sequence
    cells,  # (K, T, B, H) out, undefined outside a sequence
    T,
    B,
    weight_stride,
    H: tl.constexpr,
    PADDED: tl.constexpr,  # H up to a power of two
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,  # 0: weights stay on chip; else they stream from L2, so many units of each gate at a time
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    trial = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]  # (TILE, 1) sequences of this program
    unit = tl.arange(0, PADDED)[None, :]  # (1, PADDED)
    inside = (row < B) & (unit < H)
    length = tl.load(lengths + trial * B + row, mask=row < B, other=0)
    steps = tl.max(length)
    at = row * H + unit
    outputs += trial * T * B * H
    cells += trial * T * B * H + at
    gates += trial * T * B * 4 * H + row * 4 * H + unit
    weights += trial * weight_stride
    for t in range(steps, T):
        tl.store(outputs + t * B * H + at, tl.zeros((TILE, PADDED), tl.float32), mask=inside)
    if CHUNK == 0:
        source = tl.arange(0, PADDED)[:, None]  # (PADDED, 1) units that are read
        known = (source < H) & (unit < H)
        wi, wf, wg, wo = _load4(weights + unit * H + source, H * H, known)
    h = tl.zeros((TILE, PADDED), tl.float32)
    c = tl.zeros((TILE, PADDED), tl.float32)
    t = steps - 1 if REVERSE else 0
    towards = -1 if REVERSE else 1
    valid = inside & (t < length)  # false as well where no sequence has a step
    ni, nf, ng, no = _load4(gates + t * B * 4 * H, H, valid)
    for s in range(steps):
        i, f, g, o = ni, nf, ng, no
        following = t + towards
        more = inside & (following < tl.where(s + 1 < steps, length, -1))
        ni, nf, ng, no = _load4(gates + following * B * 4 * H, H, more)  # before the product, so that they overlap
        if CHUNK == 0:
            i = _dot(h, wi, i, PRECISION)
            f = _dot(h, wf, f, PRECISION)
            g = _dot(h, wg, g, PRECISION)
            o = _dot(h, wo, o, PRECISION)
        else:
            past = outputs + (t - towards) * B * H
            for first in range(0, H, CHUNK):
                column = first + tl.arange(0, CHUNK)
                read = (row < B) & (column < H)[None, :] & (s > 0)
                part = tl.load(past + row * H + column[None, :], mask=read, other=0.0)
                known = (column < H)[:, None] & (unit < H)
                wi, wf, wg, wo = _load4(weights + unit * H + column[:, None], H * H, known)
                i = _dot(part, wi, i, PRECISION)
                f = _dot(part, wf, f, PRECISION)
                g = _dot(part, wg, g, PRECISION)
                o = _dot(part, wo, o, PRECISION)
        i, f, g, o = _sigmoid(i), _sigmoid(f), _tanh(g), _sigmoid(o)
        c = tl.where(valid, f * c + i * g, 0.0)
        h = o * _tanh(c)
        _store4(gates + t * B * 4 * H, H, i, f, g, o, inside)
        tl.store(cells + t * B * H, c, mask=inside)
        tl.store(outputs + t * B * H + at, h, mask=inside)
        if CHUNK:
            tl.debug_barrier()  # the next step reads h from memory, written by other threads
        valid = more
        t = following


@triton.jit
def _backward_kernel(
    gates,  # (K, T, B, 4H) in: the activated gates; out: gradients of their inputs, zero outside a sequence
    weights,  # (K, 4H, H) float32 or bfloat16, trials `weight_stride` elements apart
    lengths,  # (K, B) int32
    gradients,  # (K, T, B, H) of the outputs
    cells,  # (K, T, B, H)
    T,
    B,
    weight_stride,
    H: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    trial = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    unit = tl.arange(0, PADDED)[None, :]
    inside = (row < B) & (unit < H)
    length = tl.load(lengths + trial * B + row, mask=row < B, other=0)
    steps = tl.max(length)
    gradients += trial * T * B * H + row * H + unit
    cells += trial * T * B * H + row * H + unit
    all_gates = gates + trial * T * B * 4 * H
    gates = all_gates + row * 4 * H + unit
    weights += trial * weight_stride
    nothing = tl.zeros((TILE, PADDED), tl.float32)
    for t in range(steps, T):
        _store4(gates + t * B * 4 * H, H, nothing, nothing, nothing, nothing, inside)
    if CHUNK == 0:
        source = tl.arange(0, PADDED)[:, None]  # (PADDED, 1) gates that are read
        known = (source < H) & (unit < H)
        wi, wf, wg, wo = _load4(weights + source * H + unit, H * H, known)
    dh = nothing  # what later steps want of h
    dc = nothing  # and of c
    t = 0 if REVERSE else steps - 1
    towards = 1 if REVERSE else -1
    valid = inside & (t < length)
    ni, nf, ng, no = _load4(gates + t * B * 4 * H, H, valid)
    nh = tl.load(gradients + t * B * H, mask=valid, other=0.0)
    c = tl.load(cells + t * B * H, mask=valid, other=0.0)
    for s in range(steps):
        i, f, g, o = ni, nf, ng, no  # all zero outside a sequence, and with them the gradients
        dh += nh
        following = t + towards
        more = inside & (following < tl.where(s + 1 < steps, length, -1))
        before = tl.load(cells + following * B * H, mask=more, other=0.0)
        ni, nf, ng, no = _load4(gates + following * B * 4 * H, H, more)
        nh = tl.load(gradients + following * B * H, mask=more, other=0.0)
        shape = _tanh(c)
        dc += dh * o * (1 - shape * shape)
        di = dc * g * i * (1 - i)
        df = dc * before * f * (1 - f)
        dg = dc * i * (1 - g * g)
        do = dh * shape * o * (1 - o)
        _store4(gates + t * B * 4 * H, H, di, df, dg, do, inside)
        dc *= f
        dh = nothing
        if CHUNK == 0:
            dh = _dot(di, wi, dh, PRECISION)
            dh = _dot(df, wf, dh, PRECISION)
            dh = _dot(dg, wg, dh, PRECISION)
            dh = _dot(do, wo, dh, PRECISION)
        else:
            tl.debug_barrier()  # the gradients of the gates are read from memory, written by other threads
            for first in range(0, 4 * H, 4 * CHUNK):
                column = first + tl.arange(0, 4 * CHUNK)
                read = (row < B) & (column < 4 * H)[None, :]
                part = tl.load(all_gates + t * B * 4 * H + row * 4 * H + column[None, :], mask=read, other=0.0)
                known = (column < 4 * H)[:, None] & (unit < H)
                w = tl.load(weights + column[:, None] * H + unit, mask=known, other=0.0)
                dh = _dot(part, w, dh, PRECISION)
        c = before
        t = following


def plan(hidden: int, precision: str) -> dict[str, Any]:
    """The kernels' constants for a hidden size."""
    padded = max(TILE, triton.next_power_of_2(hidden))
    on_chip = padded <= (128 if precision == "bf16" else 64)  # both kernels' shared memory stays below 160 KiB
    return {
        "H": hidden,
        "PADDED": padded,
        "TILE": TILE,
        "CHUNK": 0 if on_chip else CHUNK,
        "PRECISION": precision,
        "num_warps": WARPS.get(padded, 16),
    }


# ---- layers


class _Layer(torch.autograd.Function):
    """One layer in one direction."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
        lengths: Tensor,
        reverse: bool,
        precision: str,
    ) -> Tensor:
        K, T, B, inputs = x.shape
        H = weight_hh.shape[2]
        gates = _matmul(x.reshape(K, T * B, inputs), weight_ih.transpose(1, 2), precision)  # (K, T*B, 4H)
        gates = gates.add_((bias_ih + bias_hh)[:, None]).view(K, T, B, 4 * H)
        outputs, cells = x.new_empty(K, T, B, H), x.new_empty(K, T, B, H)
        recurrent = weight_hh.bfloat16() if precision == "bf16" else weight_hh
        options = plan(H, precision) | {"REVERSE": reverse}
        if precision == "bf16" and x.device.type == "cpu":
            options["PRECISION"] = "rounded"
        ctx.launch = {"T": T, "B": B, "weight_stride": recurrent.stride(0), **options}
        _forward_kernel[(K, triton.cdiv(B, TILE))](gates, recurrent, lengths, outputs, cells, **ctx.launch)
        ctx.save_for_backward(x, weight_ih, recurrent, lengths, gates, outputs, cells)
        ctx.precision = precision
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_ih, recurrent, lengths, gates, outputs, cells = ctx.saved_tensors
        (K, T, B, inputs), H, precision = x.shape, recurrent.shape[2], ctx.precision
        grid = (K, triton.cdiv(B, TILE))
        _backward_kernel[grid](gates, recurrent, lengths, gradients.contiguous(), cells, **ctx.launch)
        torch.autograd.graph.increment_version(gates)  # they are spent: a second backward raises
        late, early = (gates[:, :-1], outputs[:, 1:]) if ctx.launch["REVERSE"] else (gates[:, 1:], outputs[:, :-1])
        flat = gates.view(K, T * B, 4 * H)
        dx = _matmul(flat, weight_ih, precision).view(K, T, B, inputs) if ctx.needs_input_grad[0] else None
        d_ih = _matmul(flat.transpose(1, 2), x.reshape(K, T * B, inputs), precision)
        late, early = late.reshape(K, (T - 1) * B, 4 * H), early.reshape(K, (T - 1) * B, H)
        d_hh = _matmul(late.transpose(1, 2), early, precision)
        bias = flat.sum(1)
        return dx, d_ih, d_hh, bias, bias, None, None, None


def _matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """Batched product. float32 ones follow `torch.set_float32_matmul_precision`: "high" is tf32, "highest" ieee."""
    return torch.bmm(a.bfloat16(), b.bfloat16()).float() if precision == "bf16" else torch.bmm(a, b)


def lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    lengths: Tensor | None = None,
    reverse: bool = False,
    precision: str = "tf32",
) -> Tensor:
    """K LSTM layers at once: x (K, T, B, I), weights (K, 4H, I) and (K, 4H, H), biases (K, 4H) to (K, T, B, H).

    lengths (K, B) int32, at most T: outputs after a sequence's last step are zero, and what x holds there changes
    nothing if it is finite; None: all T. `reverse` goes from each sequence's last step to its first, as nn.LSTM's
    second direction does. Raises FusedError.
    """
    K, T, B, _ = x.shape
    if precision not in PRECISIONS:
        raise FusedError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if x.dtype != torch.float32:
        raise FusedError(f"x must be float32, got {x.dtype}; the products' precision is an option of its own")
    if lengths is None:
        lengths = torch.full((K, B), T, dtype=torch.int32, device=x.device)
    if lengths.shape != (K, B) or lengths.dtype != torch.int32:
        raise FusedError(f"lengths must be int32 of shape {(K, B)}, got {lengths.dtype} of {tuple(lengths.shape)}")
    if weight_hh.stride()[1:] != (weight_hh.shape[2], 1):
        weight_hh = weight_hh.contiguous()
    return _Layer.apply(x, weight_ih, weight_hh, bias_ih, bias_hh, lengths.contiguous(), reverse, precision)


# ---- trials


class FusedTrials:
    """K trials in training as one: binary classifiers with one `lstm` (nn.LSTM) and one `head` (nn.Linear to a logit).

    The head reads the forward direction's last valid step and the reverse one's first. A step is AdamW on the mean
    cross-entropy of each trial's own batch and has no work on the host, so that it can be captured.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        values: Tensor,
        lengths: Tensor,
        labels: Tensor,
        batch_size: int,
        learning_rates: Sequence[float],
        weight_decays: Sequence[float],
        precision: str = "tf32",
    ) -> None:
        """values (N, T, F) padded with finite numbers, lengths (N,), labels (N,), all moved to where the models are."""
        self.models, self.batch_size, self.precision = list(models), batch_size, precision
        self.lstms = _alike(self.models)
        first = self.lstms[0]
        device = first.weight_ih_l0.device
        self.hidden = _round_up(max(lstm.hidden_size for lstm in self.lstms))
        self.flat, self.parameters = _stack(shapes(first, self.hidden), len(self.models), device)
        for trial in range(len(self.models)):
            for own, slot in self.slots(trial):
                slot.copy_(own.detach().reshape(slot.shape))
        self.values, self.labels = values.to(device), labels.to(device, torch.float32)
        self.lengths = lengths.to(device, torch.int32)
        self.orders = torch.arange(len(values), device=device).repeat(len(self.models), 1)  # (K, N)
        self.position = torch.zeros((), dtype=torch.int64, device=device)  # batches of this epoch so far
        self.loss_sum = torch.zeros(len(self.models), device=device)
        self.learning_rates = torch.tensor(learning_rates, device=device)[:, None]  # (K, 1)
        self.weight_decays = torch.tensor(weight_decays, device=device)[:, None]
        self.steps = torch.zeros((), dtype=torch.float64, device=device)  # float32 has too few digits for 1 - 0.999
        self.means, self.squares = torch.zeros_like(self.flat), torch.zeros_like(self.flat)  # (K, P)
        named = sum(parameter[0].numel() for parameter in self.parameters.values())
        self.filling = self.flat.new_zeros(len(self.models), self.flat.shape[1] - named)

    def begin_epoch(self, orders: Tensor) -> None:
        """orders (K, N): the sequences of each trial in the order of its batches; a last, partial batch is left out."""
        self.orders.copy_(orders)
        self.position.zero_()
        self.loss_sum.zero_()

    def step(self) -> None:
        """One batch of every trial."""
        K, B = len(self.models), self.batch_size
        column = self.position % (len(self.values) // B) * B + torch.arange(B, device=self.flat.device)
        chosen = self.orders.gather(1, column.expand(K, B))  # (K, B)
        logits = self.logits(self.values[chosen].transpose(1, 2).contiguous(), self.lengths[chosen])
        loss = nn.functional.binary_cross_entropy_with_logits(logits, self.labels[chosen], reduction="none").mean(1)
        gradients = torch.autograd.grad(loss.sum(), list(self.parameters.values()))
        self._adamw(torch.cat([*(gradient.flatten(1) for gradient in gradients), self.filling], 1))
        self.loss_sum += loss.detach()
        self.position += 1

    def logits(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (K, T, B, F), lengths (K, B) int32 to (K, B)."""
        last = (lengths.long() - 1)[:, None, :, None].expand(-1, 1, -1, self.hidden)
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for layer in range(self.lstms[0].num_layers):
            ways = []
            for suffix in _suffixes(self.lstms[0]):
                weights = [self.parameters[f"lstm.{kind}_l{layer}{suffix}"] for kind in kinds]
                ways.append(lstm(x, *weights, lengths, suffix == "_reverse", self.precision))
            x = torch.cat(ways, 3) if len(ways) > 1 else ways[0]
        ends = [way.gather(1, last)[:, 0] if n == 0 else way[:, 0] for n, way in enumerate(ways)]  # D of (K, B, H)
        head = self.parameters["head.weight"].transpose(1, 2)
        return torch.baddbmm(self.parameters["head.bias"][:, None], torch.cat(ends, 2), head).squeeze(2)

    @torch.no_grad()
    def predict(self, values: Tensor, lengths: Tensor) -> Tensor:
        """The probability of class 1 by every trial: values (N, T, F), lengths (N,) to (K, N)."""
        K = len(self.models)
        found = []
        for part, length in zip(values.split(self.batch_size), lengths.int().split(self.batch_size), strict=True):
            x = part.transpose(0, 1).expand(K, -1, -1, -1)
            found.append(self.logits(x, length.expand(K, -1)).sigmoid())
        return torch.cat(found, 1)

    def captured(self) -> Callable[[], None]:
        """`step` as one CUDA graph. The three steps that warm it up train like any other."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            self.step()
        return graph.replay

    def write_back(self) -> None:
        """Give every model its trained weights."""
        for trial in range(len(self.models)):
            for own, slot in self.slots(trial):
                own.data.copy_(slot.reshape(own.shape))

    def padding(self) -> float:
        """The sum of the sizes of all padded weights: 0.0, or something is wrong."""
        rest = self.flat.detach().clone()
        for trial in range(len(self.models)):
            for _, slot in self.slots(trial, rest):
                slot.zero_()
        return float(rest.abs().sum())

    @torch.no_grad()
    def _adamw(self, gradient: Tensor) -> None:
        """torch.optim.AdamW's step on all trials' parameters, gradient (K, P)."""
        self.steps += 1
        mean, square = ((1 - beta**self.steps).float() for beta in BETAS)  # bias corrections
        self.flat.mul_(1 - self.learning_rates * self.weight_decays)
        self.means.lerp_(gradient, 1 - BETAS[0])
        self.squares.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        scale = (self.squares / square).sqrt_().add_(EPSILON)
        self.flat.sub_(self.learning_rates / mean * self.means / scale)

    def slots(self, trial: int, flat: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter of a trial's model with its place in `flat` (K, P), else in the trained parameters.

        A place is a view (row blocks, rows, column blocks, columns) without the padding.
        """
        own = shapes(self.lstms[trial], self.lstms[trial].hidden_size)
        row = (self.flat if flat is None else flat)[trial]
        at = 0
        for name, (rows, height, columns, width) in shapes(self.lstms[trial], self.hidden).items():
            size = rows * height * columns * width
            block = row[at : at + size].view(rows, height, columns, width)
            yield self.models[trial].get_parameter(name), block[:, : own[name][1], :, : own[name][3]]
            at += size


def shapes(lstm: nn.LSTM, H: int) -> dict[str, tuple[int, int, int, int]]:
    """A trial's parameters at hidden size H as (row blocks, rows, column blocks, columns).

    Blocks are gates and directions: each is padded by itself.
    """
    D = 2 if lstm.bidirectional else 1
    found = {}
    for layer in range(lstm.num_layers):
        columns = (D, H) if layer else (1, lstm.input_size)
        for end in _suffixes(lstm):
            found[f"lstm.weight_ih_l{layer}{end}"] = (4, H, *columns)
            found[f"lstm.weight_hh_l{layer}{end}"] = (4, H, 1, H)
            found[f"lstm.bias_ih_l{layer}{end}"] = (4, H, 1, 1)
            found[f"lstm.bias_hh_l{layer}{end}"] = (4, H, 1, 1)
    return found | {"head.weight": (1, 1, D, H), "head.bias": (1, 1, 1, 1)}


def _round_up(number: int) -> int:
    return -(-number // ALIGNED) * ALIGNED


def _suffixes(lstm: nn.LSTM) -> tuple[str, ...]:
    """What the names of each direction's parameters end in."""
    return ("", "_reverse") if lstm.bidirectional else ("",)


def _alike(models: Sequence[nn.Module]) -> list[nn.LSTM]:
    """The models' LSTMs. Raises FusedError where they differ in more than the hidden size."""
    lstms = [model.get_submodule("lstm") for model in models]
    kinds = {(lstm.input_size, lstm.num_layers, lstm.bidirectional) for lstm in lstms}
    if len(kinds) != 1:
        raise FusedError(f"fused trials must agree in features, layers and direction, got {sorted(kinds)}")
    if any(lstm.dropout and lstm.num_layers > 1 for lstm in lstms):
        raise FusedError("fused trials have no dropout between layers; give the LSTMs dropout=0")
    return lstms


def _stack(
    shapes: dict[str, tuple[int, int, int, int]], trials: int, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """All parameters as one tensor (K, P) of zeros, and each by name as a view into it that takes gradients."""
    sizes = [rows * height * columns * width for rows, height, columns, width in shapes.values()]
    flat = torch.zeros(trials, _round_up(sum(sizes)), device=device)
    parts, views = flat[:, : sum(sizes)].split(sizes, 1), {}
    for (name, (rows, height, columns, width)), part in zip(shapes.items(), parts, strict=True):
        vector = "bias" in name
        view = part.view(trials, rows * height) if vector else part.view(trials, rows * height, columns * width)
        views[name] = view.detach().requires_grad_()
    return flat, views


# ---- what the kernels take of a GPU


def usage(kernel: Any, hidden: int, precision: str) -> tuple[int, int, int]:
    """Registers and bytes of stack (spills) of a thread and bytes of shared memory of a program, on a Hopper GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = plan(hidden, precision) | {"REVERSE": False}
    warps = options.pop("num_warps")
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(options, "constexpr")
    types |= {"lengths": "*i32", "T": "i32", "B": "i32", "weight_stride": "i32"}
    types["weights"] = "*bf16" if precision == "bf16" else "*fp32"
    aligned = [n for n, name in enumerate(types) if types[name] != "constexpr" and name != "T"]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs=options,
        attrs={(n,): [["tt.divisibility", 16]] for n in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(word.split(":")[:2] for word in report.stdout.split() if ":" in word)
    return int(found["REG"]), int(found["STACK"]), built.metadata.shared


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--hidden", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    options.add_argument("--precision", nargs="+", default=["tf32", "bf16"], choices=PRECISIONS)
    given = options.parse_args()
    print(f"Triton {triton.__version__}, sm_90\n{'kernel':18} {'H':>4} {'':5} warps registers  stack  shared")
    for hidden in given.hidden:
        for precision in given.precision:
            warps = plan(hidden, precision)["num_warps"]
            for kernel in (_forward_kernel, _backward_kernel):
                registers, stack, shared = usage(kernel, hidden, precision)
                name = kernel.__name__.strip("_")
                print(f"{name:18} {hidden:4} {precision:5} {warps:5} {registers:9} {stack:6} {shared:7}", flush=True)


if __name__ == "__main__":
    main()
