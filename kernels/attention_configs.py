"""Tiles, warps and stages of the attention kernels by architecture, dtype, head dim and length: tables, so that nothing is tried out in a step.

Taken from what the compilers make of them, none of it yet timed: of the tiles that keep everything in registers the largest, for a tile of M
queries and N keys reads M + N rows for M N scores. On Hopper the copy engine feeds the tiles (descriptors), and warps are specialized, some to
copy and some to multiply, wherever the compiler can do that and rows lie as the copy engine reads them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from nanotrain.kernels.attention_tiles import Features, parts
from nanotrain.kernels.runtime import architecture


class Config(NamedTuple):
    """How a kernel is compiled."""

    block_m: int
    """Queries of a tile."""
    block_n: int
    """Keys of a tile."""
    warps: int
    stages: int
    specialized: bool = False
    """Rows come through tensor descriptors, some warps copy and others multiply."""

    def options(self) -> dict[str, object]:
        """What a launch takes."""
        return dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n, num_warps=self.warps, num_stages=self.stages)


FUSED = 128
"""The widest heads for which one kernel can make all three gradients."""

SHORT = 512
"""Rows of a document that count as few: they make few tiles, so that smaller ones keep more of the GPU busy."""

Tile = tuple[int, int, int, int]
"""Queries, keys, warps, stages."""

Rows = tuple[tuple[int | Tile | None, ...], ...]
"""The largest width that a row is for, then its tiles: for short documents, for longer ones, and for either where there is a bias or dropout,
which take registers of their own; where fewer are given, the last is for the rest. A width is a power of two or the sum of two; where q's and
v's differ the larger counts."""

# Specialized warps, for half precision: those that multiply are two groups of 4, which halve the rows that a program owns, queries or keys. There
# must be 128 of them: of 64 both groups compute all. Of the kernel that owns queries 128 do not compile. Every program makes its own descriptors,
# about as long as a tile takes, so that short documents do without.

_SPECIALIZED: dict[str, dict[str, Rows]] = {
    "sm_90": {
        "forward": ((128, None, (128, 128, 4, 2)), (256, None, (128, 64, 4, 2))),
        "keys": ((64, None, (64, 128, 4, 2)), (128, None, (32, 128, 4, 2))),
    },
    "interpreter": {"forward": ((256, (32, 16, 4, 1)),), "keys": ((256, (16, 32, 4, 1)),)},
}  # fmt: skip

_HALF: dict[str, dict[str, Rows]] = {
    "sm_80": {
        "forward": (
            (64, (64, 64, 8, 2), (128, 64, 8, 3), (64, 64, 8, 2)), (96, (64, 64, 4, 2), (128, 64, 8, 3), (64, 64, 8, 2)),
            (128, (64, 32, 4, 2), (128, 64, 8, 3), (64, 32, 8, 2)), (192, (32, 32, 8, 2)), (256, (64, 32, 8, 2)),
        ),
        "keys": (
            (64, (32, 64, 8, 2), (32, 128, 8, 2), (32, 64, 8, 1)), (96, (32, 64, 4, 2), (32, 128, 8, 2), (32, 64, 8, 2)),
            (128, (64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)), (192, (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
            (256, (32, 32, 8, 2)),
        ),
        "queries": (
            (64, (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)), (128, (64, 32, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
            (192, (32, 32, 8, 2)), (256, (64, 32, 8, 1)),
        ),
        "fused": ((96, (32, 128, 8, 2)), (128, (64, 64, 8, 2))),
        "bias": ((64, (64, 32, 8, 2)), (256, (16, 32, 8, 1))),
    },
    "sm_90": {
        "forward": (
            (96, (64, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 2)), (128, (64, 64, 4, 2), (128, 64, 8, 3), (64, 32, 8, 2)),
            (256, (64, 32, 4, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
        ),
        "keys": (
            (64, (32, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2)), (128, (32, 64, 8, 2), (32, 128, 8, 2), (32, 64, 8, 2)),
            (256, (32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
        ),
        "queries": (
            (96, (64, 64, 4, 2), (128, 64, 8, 3), (64, 64, 8, 2)), (128, (64, 64, 4, 2), (128, 64, 8, 3), (64, 32, 8, 2)),
            (192, (64, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)), (256, (64, 32, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1)),
        ),
        "fused": ((64, (64, 128, 8, 2)), (128, (64, 64, 8, 2))),
        "bias": ((64, (64, 64, 8, 2)), (256, (64, 32, 8, 2))),
    },
    "sm_100": {
        "forward": (
            (64, (64, 64, 4, 2), (128, 64, 8, 3), (64, 64, 8, 2)), (128, (64, 32, 4, 2), (128, 64, 8, 3), (64, 32, 8, 2)),
            (256, (64, 32, 4, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
        ),
        "keys": (
            (128, (64, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2)), (256, (64, 64, 8, 1), (64, 64, 8, 1), (32, 64, 8, 2)),
        ),
        "queries": (
            (64, (64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 8, 2)), (128, (64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
            (192, (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
            (256, (64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
        ),
        "fused": ((64, (64, 128, 8, 2)), (128, (64, 64, 8, 2))),
        "bias": ((64, (64, 64, 8, 2)), (128, (64, 32, 8, 2)), (256, (16, 32, 8, 1))),
    },
    "gfx942": {
        "forward": ((256, (64, 32, 4, 1)),), "keys": ((128, (32, 64, 8, 1)), (256, (32, 32, 4, 1))),
        "queries": ((128, (64, 32, 4, 1)), (256, (32, 32, 4, 1))), "fused": ((128, (32, 64, 8, 1)),),
        "bias": ((64, (16, 32, 4, 1)), (128, (64, 64, 8, 2)), (256, (64, 64, 4, 2))),
    },
}  # fmt: skip

# fp32 multiplies on the ordinary units of NVIDIA's GPUs, as PyTorch's own products do by default. No product has 64 rows there: of one that has,
# and that meets dropout's mask, Triton's compiler for Blackwell makes TF32, whatever precision is asked for.

_FULL: dict[str, dict[str, Rows]] = {
    "nvidia": {
        "forward": ((64, (32, 32, 4, 2)), (96, (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)), (256, (32, 16, 8, 2))),
        "keys": (
            (64, (32, 32, 8, 2)), (96, (32, 32, 4, 2)), (128, (32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 4, 2)),
            (192, (16, 32, 8, 1)), (256, (16, 16, 8, 1)),
        ),
        "queries": (
            (64, (32, 32, 4, 2)), (96, (32, 16, 4, 2), (32, 16, 4, 2), (32, 32, 8, 2)), (128, (32, 16, 4, 2)), (256, (16, 32, 8, 2)),
        ),
        "fused": ((64, (32, 32, 8, 2)), (128, (16, 32, 8, 1))),
        "bias": ((256, (32, 32, 8, 2)),),
    },
    "gfx942": {
        "forward": ((256, (32, 16, 4, 2)),), "keys": ((128, (16, 32, 4, 2), (16, 64, 8, 2)), (256, (16, 16, 4, 1))),
        "queries": ((256, (32, 16, 4, 2)),), "fused": ((128, (16, 32, 4, 2)),),
        "bias": ((64, (32, 32, 8, 2)), (256, (32, 16, 4, 1))),
    },
}  # fmt: skip

_INTERPRETER = _SPECIALIZED["interpreter"] | {
    "queries": ((256, (32, 16, 4, 1)),), "fused": ((128, (16, 32, 4, 1)),), "bias": ((256, (32, 16, 4, 1)),),
}  # fmt: skip


def _tile(rows: Rows, width: int, which: int) -> Tile | None:
    """Tile number `which` (0, 1 or 2) of the row for this width."""
    tiles = next((tiles for limit, *tiles in rows if width <= limit), (None,))
    return tiles[min(which, len(tiles) - 1)]


def config(kernel: str, tensors: tuple[torch.Tensor, ...], f: Features, length: int) -> Config:
    """The configuration of a kernel ("forward", "keys", "queries", "fused" for both of these in one, "bias") for (q, k, v) or (q, k, v, grad).

    `length` is the most rows of a document that programs share out among them.
    """
    q, _, v, *_ = tensors
    target, half = architecture(q.device), q.element_size() == 2
    width = max(sum(parts(q.shape[3])), sum(parts(v.shape[3])))
    which = 2 if f.bias is not None or f.seeds is not None else 1 if length > SHORT else 0
    if (half or target == "interpreter") and _serves(kernel, tensors, f):
        if (tile := _tile(_SPECIALIZED.get(target, {}).get(kernel, ()), width, which)) is not None:
            return Config(*tile, specialized=True)
    if target == "interpreter":
        table = _INTERPRETER
    elif target.startswith("gfx"):
        table = (_HALF if half else _FULL)["gfx942"]
    else:
        table = _HALF.get(target, _HALF["sm_80"]) if half else _FULL["nvidia"]
    return Config(*_tile(table[kernel], width, which))


def _serves(kernel: str, tensors: tuple[torch.Tensor, ...], f: Features) -> bool:
    """Whether the copy engine can read these rows, and the compiler specialize warps for these features."""
    q, k, *_ = tensors
    if f.bias is not None or f.seeds is not None or not all(x.numel() for x in tensors):
        return False
    # Rows of whole parts, apart from each other, 16 bytes aligned wherever a head or a document begins.
    if any(parts(x.shape[3]) != (x.shape[3], 0) or x.stride(3) != 1 or x.stride(1) < x.shape[3] for x in tensors):
        return False
    if any(x.data_ptr() % 16 or any(stride * x.element_size() % 16 for stride in x.stride()[:3]) for x in tensors):
        return False
    # Keys meet the queries of their whole group, whose heads a descriptor takes for one wide row.
    return kernel != "keys" or q.shape[2] == k.shape[2] or all(x.stride(2) == x.shape[3] for x in (q, *tensors[3:]))
