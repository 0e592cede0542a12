"""The functions of csrc/train.cpp: the native form of operations on a CPU, called on the memory of contiguous tensors."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from nanotrain.kernels.native import library
from nanotrain.kernels.runtime import launches

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

SIGNATURES = {
    "swiglu": (_P,) * 3 + (_I,),
    "swiglu_back": (_P,) * 5 + (_I,),
    "geglu": (_P,) * 3 + (_I,),
    "geglu_back": (_P,) * 5 + (_I,),
    "norm": (_P,) * 6 + (_I, _I, _F, _F),
    "norm_back": (_P,) * 8 + (_I, _I, _I, _F),
    "rope": (_P, _I, _I, _I) * 2 + (_P,) * 3 + (_I,) * 6 + (_F,),
    "softmax": (_P, _P) + (_I,) * 4 + (_F,),
    "softmax_back": (_P,) * 3 + (_I, _I, _F),
    "cross_entropy": (_P,) * 4 + (_I,) * 3,
    "adamw": (_P,) * 5 + (_I,) + (_F,) * 9,
    "adamw_wide": (_P,) * 5 + (_I,) + (_F,) * 9,
}
"""Arguments of each function: pointers, sizes and numbers in fp32. csrc/train.cpp names them; the two must be changed together."""


@cache
def _function(name: str, dtype: torch.dtype):
    function = getattr(library("train"), f"{name}_{'bf16' if dtype == torch.bfloat16 else 'float'}")
    function.argtypes, function.restype = SIGNATURES[name], ctypes.c_bool
    return function


def call(name: str, dtype: torch.dtype, *arguments: torch.Tensor | float | None) -> bool:
    """Call the function for fp32 or bf16 tensors; None is a null pointer. Returns its result, which means something for "rope" alone.

    A tensor given must be on the CPU, in the layout that csrc/train.cpp says; nothing here looks after it.
    """
    launches[name] += 1
    return _function(name, dtype)(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments))


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor with its elements in memory one after another, as C++ reads them; None stays None."""
    return None if tensor is None else tensor.resolve_neg().contiguous()
