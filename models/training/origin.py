"""Where an epoch was computed: what the last bits of its numbers depend on, beside the data and the configuration."""

from __future__ import annotations

import socket

import torch


def origin_of(device: torch.device, lstm_kernel: str) -> str:
    """Host, device, the LSTM's kernel on a CPU, torch and its build, as in

    host-a: NVIDIA H100 80GB HBM3, torch 2.13.0+cu130
    host-a: cpu, native-1a2b3c, torch 2.13.0+cpu
    """
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{device.type}, {'torch LSTM' if lstm_kernel == 'torch' else lstm_kernel}"
    return f"{socket.gethostname()}: {where}, torch {torch.__version__}"
