"""What a case is: a way in which a public function is called, with its workloads, its cost and its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch

Inputs = dict[str, object]
"""Tensors, or lists of them, by the names of the function's arguments."""

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@dataclass(frozen=True)
class Case:
    """One way in which one public function is called."""

    name: str
    """The public function, the NAME of the command lines."""
    module: str
    """Its file is kernels/<module>.py."""
    shapes: tuple[tuple[int, ...], ...]
    """Workloads that together reach every row of the kernel's table of configurations."""
    make: Callable[[tuple[int, ...], torch.dtype, str], Inputs]
    """(shape, dtype, device) -> inputs: random, or without storage on "meta"; those that get gradients ask for them."""
    call: Callable[[Inputs, str], object]
    """(inputs, impl) -> the result, a tensor or a tuple of them; None of functions that write in place."""
    cost: Callable[[tuple[int, ...], torch.dtype], tuple[int, int]]
    """(shape, dtype) -> (bytes moved, FLOPs) of the forward."""
    backward_cost: Callable[[tuple[int, ...], torch.dtype], tuple[int, int]] | None = None
    """The same of the backward; None of functions that have none."""
    variant: str = ""
    """What sets this case apart from others of its function, as "residual"."""
    always: int = 1
    """So many shapes, the first ones, are always compiled: enough to reach each kernel."""
    dtypes: tuple[torch.dtype, ...] = DTYPES
    peers: dict[str, Callable[[], Callable[[Inputs], object]]] = field(default_factory=dict)
    """By name, what imports and returns a function of the inputs that does the same; ImportError where it is not installed."""
    product: Callable[[str, torch.dtype, str], str] = lambda kernel, dtype, target: "-"
    """(kernel, dtype, target) -> the matrix instruction it must have (wgmma, mma, tcgen05, mfma); "-" for none, as elementwise kernels."""
    stack: dict[tuple[str, str], int] = field(default_factory=dict)
    """Bytes of local memory per thread that a (kernel, target) may use; what is not named may use none."""
    slow: bool = False
    """Whether only --all compiles every shape, which takes minutes; without it those always compiled are, even where the kernel has changed."""
    in_place: bool = False
    """Whether its results are what it leaves in its inputs."""
    unlike: tuple[str, ...] = ()
    """Peers that take as many steps to the same end by other coefficients: they are timed, their results are not compared."""

    @property
    def title(self) -> str:
        """Its name, with the variant where it has one."""
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def installed_peers(self) -> dict[str, Callable[[Inputs], object]]:
        """The peers that can be imported here."""
        found = {}
        for name, load in self.peers.items():
            try:
                found[name] = load()
            except ImportError:
                continue
        return found


def wanted(inputs: Inputs) -> list[torch.Tensor]:
    """The inputs whose gradients a backward computes."""
    return [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]


def results(output: object) -> list[torch.Tensor]:
    """The tensors that a call returned, in a list."""
    return [] if output is None else [output] if isinstance(output, torch.Tensor) else [x for x in output if x is not None]


def upstream(output: object) -> list[torch.Tensor]:
    """Random gradients for what a call returned."""
    return [torch.randn_like(x) for x in results(output)]


def normal(*shape: int, dtype: torch.dtype, device: str, grad: bool = False) -> torch.Tensor:
    # Without storage there is nothing to draw, and torch.randn takes a hundred times as long to find that out.
    return (torch.empty if device == "meta" else torch.randn)(shape, dtype=dtype, device=device).requires_grad_(grad)


def eager(function: Callable) -> Callable:
    return lambda: function


def compiled(function: Callable) -> Callable:
    """A formula through torch.compile, compiled once for each shape."""
    return cache(lambda: torch.compile(function, dynamic=False))


def formula(function: Callable) -> dict[str, Callable]:
    """The two peers that every kernel has: its formula in plain PyTorch, and that through torch.compile."""
    return {"torch": eager(function), "torch.compile": compiled(function)}
