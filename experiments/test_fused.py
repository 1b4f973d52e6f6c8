"""The fused kernel of experiments/fused.py compared with nn.LSTM and torch's AdamW in float64, on the CPU.

Triton is told to interpret its kernels before it is imported, so all of it runs in a process of its own: the tests of
`TestFused` are collected there only.

Tolerances are shares of a tensor's largest element. A rounding of float32 is 2**-24 = 6e-8 of what is rounded; sums of
some dozens of terms that cancel were off by up to 5e-6 of what is left over four seeds. A rounding of bfloat16 is
2**-9 = 2e-3, of which up to 9e-3 was seen. A mistake in a formula is off by 0.1 and more.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from hpo.models.classifier import Classifier
from hpo.models.config import ClassifierConfig

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "experiments" / "fused.py"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE, BFLOAT16_TOLERANCE = 1e-5, 2e-2
KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def need_triton() -> None:
    if platform.system() != "Linux" or importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is there for Linux on x86_64 and aarch64 only: pip install 'triton>=3.6,<3.8'")
    if metadata.version("triton").startswith("3.6"):
        pytest.skip("the interpreter of Triton 3.6 does not run with numpy 2.4: pip install 'triton>=3.7,<3.8'")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_fused_kernel_in_a_process_that_interprets_it() -> None:
    need_triton()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV"))}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is not compiled")
def test_the_kernels_compile_for_a_gpu_and_fit_on_it(tmp_path: Path) -> None:
    need_triton()
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), "--hidden", "16", "72", "--precision", "tf32"]  # on chip; streamed
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "_kernel" in line]
    assert [row[:2] for row in rows] == [
        [f"{way}_kernel", size] for size in ("16", "72") for way in ("forward", "backward")
    ]
    assert all(int(row[-1]) <= 227 * 1024 for row in rows), f"more shared memory than a Hopper program has: {rows}"


@pytest.fixture(scope="module")
def fused() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("fused", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fused"] = module
    torch.set_num_threads(1)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fused"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def assert_close(found: Tensor, right: Tensor, tolerance: float = TOLERANCE) -> None:
    error = (found.double() - right).abs().max()
    assert error <= tolerance * right.abs().max(), f"off by {error / right.abs().max():.1e} of the largest element"


def run_nn_lstm(lstm: nn.LSTM, x: Tensor, lengths: Tensor) -> Tensor:
    """x (T, B, I) to (T, B, D*H), each sequence within its own length."""
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(lstm(packed)[0], total_length=len(x))[0]


def make_lengths(K: int, B: int, T: int, ragged: bool) -> Tensor:
    return torch.randint(1, T + 1, (K, B)) if ragged else torch.full((K, B), T)


def make_models(hidden: Sequence[int], features: int, layers: int, bidirectional: bool) -> list[Classifier]:
    shape = {"features": features, "classes": 2, "steps": 1, "layers": layers, "bidirectional": bidirectional}
    return [Classifier(ClassifierConfig(**shape, hidden_size=size)) for size in hidden]  # type: ignore[arg-type]


class TestFused:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize(
        ("T", "inputs", "H", "B", "K", "ragged"),
        [
            (1, 1, 1, 1, 1, False),
            (3, 3, 16, 16, 2, False),
            (4, 2, 12, 21, 2, True),
            (3, 3, 70, 3, 2, True),  # more than fits on a chip: streamed
        ],
    )
    def test_a_layer_and_its_gradients_are_those_of_nn_lstm(
        self, fused: ModuleType, T: int, inputs: int, H: int, B: int, K: int, ragged: bool, reverse: bool
    ) -> None:
        check_layer(fused, (T, inputs, H, B, K), ragged, reverse, "ieee", TOLERANCE)

    @pytest.mark.parametrize("H", [12, 130])  # on chip and streamed
    def test_bfloat16_rounds_what_goes_into_the_products_and_nothing_else(self, fused: ModuleType, H: int) -> None:
        check_layer(fused, (3, 3, H, 5, 1), True, False, "bf16", BFLOAT16_TOLERANCE)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_padding_never_changes_an_answer(self, fused: ModuleType, reverse: bool) -> None:
        weights = [torch.randn(1, *shape) / 3 for shape in ((32, 2), (32, 8), (32,), (32,))]
        lengths = torch.tensor([[3, 1, 4]], dtype=torch.int32)
        more = torch.cat([lengths, torch.full((1, 14), 6, dtype=torch.int32)], 1)
        outside = torch.arange(7)[:, None] >= more[0]  # (7, 17)
        short, long = torch.randn(1, 4, 3, 2), torch.randn(1, 7, 17, 2)  # longer and among others
        long[:, :4, :3] = short
        long[:, outside] = 1e3  # of any size
        one = fused.lstm(short, *weights, lengths, reverse, "ieee")
        other = fused.lstm(long, *weights, more, reverse, "ieee")
        assert_close(other[:, :4, :3], one.double())
        assert not other[:, outside].any()

    @pytest.mark.parametrize(("layers", "bidirectional"), [(2, True), (3, False)])
    def test_trials_of_unlike_hidden_size_share_a_kernel(
        self, fused: ModuleType, layers: int, bidirectional: bool
    ) -> None:
        T, F, B, hidden = 3, 2, 5, (3, 8, 17)
        models = make_models(hidden, F, layers, bidirectional)
        x, lengths, weights = torch.randn(3, T, B, F), make_lengths(3, B, T, True), torch.randn(3, B)
        trials = fused.FusedTrials(models, x[0], lengths[0], weights[0], B, [0.1] * 3, [0.0] * 3, "ieee")
        found = trials.logits(x, lengths.int())
        gradients = torch.autograd.grad((found * weights).sum(), list(trials.parameters.values()))
        flat = torch.cat([gradient.flatten(1) for gradient in gradients], 1)
        for trial, model in enumerate(models):
            model.double()
            right = model.logits(x[trial].double(), lengths[trial])
            assert_close(found[trial], right)
            (right * weights[trial]).sum().backward()  # type: ignore[no-untyped-call]
            for own, slot in trials.slots(trial, flat):
                assert own.grad is not None
                assert_close(slot.reshape(own.shape), own.grad)
                slot.zero_()
        assert not flat.any(), "a padded weight has a gradient"

    def test_steps_are_those_of_adamw_on_each_trial_alone(self, fused: ModuleType) -> None:
        N, T, F, B, hidden = 17, 3, 2, 5, (4, 16, 7)
        rates, decays = [1e-2, 3e-3, 2e-2], [0.0, 0.1, 0.5]
        models = make_models(hidden, F, 2, False)
        values, lengths, labels = torch.randn(N, T, F), make_lengths(1, N, T, True)[0], torch.arange(N) % 2
        trials = fused.FusedTrials(models, values, lengths, labels, B, rates, decays, "ieee")
        orders = torch.rand(3, N).argsort(1)
        trials.begin_epoch(orders)
        for _ in range(3):
            trials.step()
        assert trials.padding() == 0.0
        for trial, model in enumerate(models):
            model.double()
            optimizer = torch.optim.AdamW(model.parameters(), rates[trial], weight_decay=decays[trial])
            total = 0.0
            for rows in orders[trial, : 3 * B].view(3, B):
                optimizer.zero_grad()
                logits = model.logits(values[rows].transpose(0, 1).double(), lengths[rows])
                loss = nn.functional.binary_cross_entropy_with_logits(logits, labels[rows].double())
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.item()
            assert float(trials.loss_sum[trial]) == pytest.approx(total, rel=1e-6)
            off = torch.cat([(slot.reshape(own.shape) - own).flatten() for own, slot in trials.slots(trial)]).abs()
            # Adam divides a gradient by its own size: where that is next to nothing, a rounding is a large part of it.
            assert off.max() < 0.01 * rates[trial]
            assert off.mean() < 1e-5 * rates[trial]

    def test_trained_weights_go_back_into_the_models(self, fused: ModuleType) -> None:
        models = make_models((3, 5), 2, 2, True)
        values, lengths, labels = torch.randn(4, 3, 2), torch.tensor([3, 1, 2, 3]), torch.arange(4) % 2
        trials = fused.FusedTrials(models, values, lengths, labels, 3, [0.1, 0.1], [0.0, 0.0], "ieee")
        trials.step()
        trials.write_back()
        found = trials.predict(values, lengths)
        for trial, model in enumerate(models):
            assert_close(found[trial], model.probabilities(values, lengths)[:, 1].double())

    def test_the_gates_are_spent_in_one_backward(self, fused: ModuleType) -> None:
        x = torch.randn(1, 2, 1, 1, requires_grad=True)
        weights = [torch.randn(1, *shape) for shape in ((4, 1), (4, 1), (4,), (4,))]
        total = fused.lstm(x, *weights, precision="ieee").sum()
        total.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()

    def test_what_does_not_fit_one_kernel_is_refused(self, fused: ModuleType) -> None:
        x, weights = torch.randn(1, 2, 3, 1), [torch.randn(1, *shape) for shape in ((4, 1), (4, 1), (4,), (4,))]
        with pytest.raises(fused.FusedError, match=r"precision must be one of ieee, tf32, bf16, got 'fp8'"):
            fused.lstm(x, *weights, precision="fp8")
        with pytest.raises(fused.FusedError, match=r"x must be float32, got torch.float64"):
            fused.lstm(x.double(), *weights)
        with pytest.raises(
            fused.FusedError, match=r"lengths must be int32 of shape \(1, 3\), got torch.int64 of \(1, 3\)"
        ):
            fused.lstm(x, *weights, torch.ones(1, 3, dtype=torch.int64))
        unlike = make_models((3,), 1, 1, False) + make_models((3,), 1, 2, False)
        with pytest.raises(fused.FusedError, match=r"agree in features, layers and direction, got \[\(1, 1, False\)"):
            fused.FusedTrials(unlike, x[0], x, x, 1, [0.1] * 2, [0.0] * 2)
        dropping = nn.ModuleDict({"lstm": nn.LSTM(1, 1, 2, dropout=0.5), "head": nn.Linear(1, 1)})
        with pytest.raises(fused.FusedError, match="no dropout between layers"):
            fused.FusedTrials([dropping], x[0], x, x, 1, [0.1], [0.0])


def check_layer(
    fused: ModuleType, shape: tuple[int, ...], ragged: bool, reverse: bool, precision: str, tolerance: float
) -> None:
    T, inputs, H, B, K = shape
    lstms = [nn.LSTM(inputs, H, bidirectional=True).double() for _ in range(K)]  # of which one direction is compared
    names = [f"{kind}_l0{'_reverse' if reverse else ''}" for kind in KINDS]
    weights = [torch.stack([lstm.get_parameter(name).detach().float() for lstm in lstms]) for name in names]
    x, given, lengths = torch.randn(K, T, B, inputs), torch.randn(K, T, B, H), make_lengths(K, B, T, ragged)
    takes = [tensor.requires_grad_() for tensor in (x, *weights)]
    outputs = fused.lstm(*takes, lengths.int(), reverse, precision)
    gradients = torch.autograd.grad((outputs * given).sum(), takes)
    for k, lstm in enumerate(lstms):
        own = x[k].detach().double().requires_grad_()
        right = run_nn_lstm(lstm, own, lengths[k])[..., H:] if reverse else run_nn_lstm(lstm, own, lengths[k])[..., :H]
        wanted = torch.autograd.grad((right * given[k]).sum(), [own, *(lstm.get_parameter(name) for name in names)])
        assert_close(outputs[k], right, tolerance)
        for found, gradient in zip(gradients, wanted, strict=True):
            assert_close(found[k], gradient, tolerance)
