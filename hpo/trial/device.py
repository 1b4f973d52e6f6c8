"""The device that a process trains on."""

from __future__ import annotations

import os

import torch


def choose_device() -> str:
    """The GPU that falls to this worker (HPO_WORKER_INDEX modulo the number of GPUs), else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('HPO_WORKER_INDEX', '0')) % torch.cuda.device_count()}"


def device_name(device: str) -> str:
    """`cpu`, or the card's name behind its index, as in `cuda:0 (NVIDIA L4)`."""
    return device if device == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
