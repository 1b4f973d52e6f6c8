"""The structs of the C files beside this one, which say what the fields are: every field has 8 bytes."""

from __future__ import annotations

import ctypes
from typing import Any

POOLINGS = ("last", "mean", "max", "concat", "attention", "flatten")  # in the order of `enum pooling`
OPTIMIZERS = ("adamw", "adam", "rmsprop", "sgd")  # in that of `enum optimizer`

Fields = list[tuple[str, Any]]


def _integers(*names: str) -> Fields:
    return [(name, ctypes.c_int64) for name in names]


def _pointers(*names: str) -> Fields:
    return [(name, ctypes.c_void_p) for name in names]


def _numbers(*names: str) -> Fields:
    return [(name, ctypes.c_double) for name in names]


class LstmShape(ctypes.Structure):
    """`struct lstm_shape` of lstm.h."""

    _fields_ = _integers("S", "B", "F", "H", "reverse", "training", "final", "step", "sequence")


class LstmInputs(ctypes.Structure):
    """`struct lstm_inputs` of lstm.h."""

    _fields_ = [
        *_pointers("x"),
        *_integers("x_step", "x_sequence"),
        *_pointers("rows", "lengths", "w_ih", "w_hh", "b_ih", "b_hh"),
    ]


class LstmGradients(ctypes.Structure):
    """`struct lstm_gradients` of lstm.h."""

    _fields_ = [
        *_pointers("dy", "w_ih", "w_hh", "dx"),
        *_integers("dx_step", "dx_sequence", "add"),
        *_pointers("lengths", "dw_ih", "dw_hh", "db_ih", "db_hh"),
    ]


class Network(ctypes.Structure):
    """`struct network` of network.h; so are the others."""

    _fields_ = [
        *_integers("channels", "stem_layers", "stem_width", "stem_kernel", "stem_stride"),
        *_integers("hidden", "layers", "directions", "pooling", "skip", "head", "outputs"),
        *_numbers("dropout"),
        *_pointers("weights", "gradients", "places", "running"),
    ]


class Data(ctypes.Structure):
    """`struct data`."""

    _fields_ = [
        *_pointers("values"),
        *_integers("step", "sequence"),
        *_pointers("lengths", "labels", "weights"),
        *_integers("mapped"),
    ]


class TrainingSettings(ctypes.Structure):
    """`struct training`."""

    _fields_ = [
        *_integers("optimizer", "count"),
        *_numbers("rate", "decay", "clip", "smoothing"),
        *_pointers("first", "second", "steps", "class_weight", "added", "factor", "drawn"),
    ]


class NetworkBatches(ctypes.Structure):
    """`struct batches`."""

    _fields_ = [
        *_pointers("rows", "ends", "shares"),
        *_integers("count", "first"),
        ("seed", ctypes.c_uint64),
        *_numbers("seconds"),
    ]
