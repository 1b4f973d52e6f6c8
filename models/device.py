"""What can go wrong with a device: its memory runs out, or it stops answering this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hpo.errors import HpoError, WorkerFault

OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "could not allocate",
    "ALLOC_FAILED",
    "_STATUS_NOT_INITIALIZED",  # cuBLAS and cuDNN, where a full card has no room for what they keep
)


FULL = 512 * 2**20  # bytes: with less free memory a library's failure is taken for the want of it


class OutOfMemory(HpoError):
    """The training does not fit the device's memory; the message has its sizes."""


class DeviceLost(WorkerFault):
    """The device does not answer this process any more: after an illegal access every call fails until it ends."""


def is_gpu(device: torch.device) -> bool:
    """Whether it runs kernels beside the CPU, which had better not wait for it, in streams and graphs."""
    return device.type == "cuda"


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's, a CPU's or a library's allocator says so: only some of them have a type of their own."""
    named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return named or any(sign in str(error) for sign in OUT_OF_MEMORY)


def is_full(device: torch.device) -> bool:
    """Whether a GPU has so little memory left that a library may fail for the want of it, whatever it says."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return free < FULL


def probe(device: torch.device) -> None:
    """Let a kernel run and wait for its answer. Raises what the device raises."""
    torch.zeros(1, device=device).add_(1).item()


def loss_of(device: torch.device) -> str | None:
    """Why the device does not answer this process any more; None where it does, or has merely no memory left."""
    try:
        probe(device)
    except RuntimeError as error:
        return None if is_out_of_memory(error) else str(error).strip().partition("\n")[0]
    return None


@contextmanager
def device_errors(device: torch.device, size: Callable[[], str]) -> Iterator[None]:
    """Turn what the block's calls to the device raise into DeviceLost or OutOfMemory, where it is one of them.

    size: what did not fit, and the way out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (reason := loss_of(device)) is not None:
            raise DeviceLost(
                f"{device} does not answer this process any more: {reason}; the worker ends, and its trials go on in "
                f"others. If it happens again, see `hpo doctor` and the driver's log (dmesg)"
            ) from error
        if not is_out_of_memory(error) and not ("_STATUS_" in str(error) and is_full(device)):
            raise
        raise OutOfMemory(f"out of memory on {device}: {size()}") from None
