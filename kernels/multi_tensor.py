"""One launch over many tensors: a table of their addresses on the device, and a map from programs to pieces of them.

Optimizers update hundreds of tensors whose sizes run from one element to a billion. A launcher makes

    table = tensor_table([params, grads], integers=[numels], numbers=[decays])   int64, a row for each tensor
    tiles = tile_map([-(-n // TILE) for n in numels], device)                    int32, (tensor, tile of it) for each program

and launches a program for each row of `tiles`, which finds its tensor's row and there the addresses and what else it needs:

    tensor, tile = locate(tiles)
    row = table + tensor * 4                                 # columns: param, grad, numel, decay
    param, grad, numel, decay = tl.load(row), tl.load(row + 1), tl.load(row + 2), number(row + 3)
    whole = ((tile + 1) * TILE <= numel) & (((param | grad) & 15) == 0)
    g = read(grad, offsets, offsets < numel, "bfloat16", False)

Both are remembered by what they hold, so that a table is never stale, whoever freed a tensor and whoever took its address; it keeps no
tensor alive. New gradients at every step cost one array and one copy to the device that nothing waits for.

bf16 is read and written as its 16 bits, by shifts and integer rounding: exact everywhere, also in Triton's interpreter, which has no bf16.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from nanotrain.kernels.runtime import jit, pinned, tl

_TABLES, _MAPS = 32, 32
"""Tables and maps remembered, the last ones used: gradients take turns at a few sets of addresses."""

_tables: OrderedDict[tuple, torch.Tensor] = OrderedDict()
_maps: OrderedDict[tuple, torch.Tensor] = OrderedDict()

_captured: list[torch.Tensor] = []
"""What captured CUDA graphs read at every replay, kept for good: a few bytes for each tensor and each capture."""


def _remembered(cache: OrderedDict[tuple, torch.Tensor], limit: int, key: tuple, make: Callable[[], np.ndarray]) -> torch.Tensor:
    """The array made() on the device key[0], from the cache where it is there."""
    device, tensor = key[0], cache.get(key)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if tensor is not None:
        cache.move_to_end(key)
        if capturing:
            _captured.append(tensor)
        return tensor
    host = pinned(torch.from_numpy(make()), device)  # torch keeps the memory until the copy below is done
    tensor = host.to(device, non_blocking=True)
    if capturing:  # the copy is part of the graph: only a replay makes it, and makes it again
        _captured.append(host)
        return tensor
    cache[key] = tensor
    if len(cache) > limit:
        cache.popitem(last=False)
    return tensor


def tensor_table(
    columns: Sequence[Sequence[torch.Tensor]], integers: Sequence[Sequence[int]] = (), numbers: Sequence[Sequence[float]] = ()
) -> torch.Tensor:
    """Device table of N tensors, int64 (N, columns): addresses first, then `integers`, then `numbers` (fp32, read by `number`).

    Each column has N entries, on the first tensor's device; an address is that of the first element. Tensors of a column must have one dtype,
    which the kernel is told (`by_dtype` makes such groups), and must live until the kernel has been launched.
    """
    bits = [np.asarray(column, dtype=np.float32).view(np.int32).tolist() for column in numbers]
    values = tuple(chain(map(torch.Tensor.data_ptr, chain(*columns)), *integers, *bits))
    first = columns[0]
    shape = (-1, len(first))
    return _remembered(_tables, _TABLES, (first[0].device, shape, values), lambda: np.array(values, np.int64).reshape(shape).T.copy())


def tile_map(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Which tile of which tensor each program does, int32 (sum of counts, 2): tensor n has counts[n] tiles, from 0; a count may be 0."""
    counts = tuple(counts)

    def make():
        number = np.array(counts)
        tensor = np.repeat(np.arange(len(counts)), number)
        tile = np.arange(len(tensor)) - np.repeat(np.cumsum(number) - number, number)
        return np.stack([tensor, tile], axis=1).astype(np.int32)

    return _remembered(_maps, _MAPS, (device, counts), make)


def by_dtype(columns: Sequence[Sequence[torch.Tensor]]) -> dict[tuple[str, ...], list[int]]:
    """Indices of the tensors that one launch can take together: their dtypes' names, a name for each column, -> indices in order.

    Commonly one group; each further one is a launch more.
    """
    rows = list(zip(*([tensor.dtype for tensor in column] for column in columns), strict=True))
    groups = {dtypes: [i for i, row in enumerate(rows) if row == dtypes] for dtypes in dict.fromkeys(rows)}
    return {tuple(str(dtype).removeprefix("torch.") for dtype in dtypes): indices for dtypes, indices in groups.items()}


def each(numbers: Sequence[float] | float | None, count: int) -> Sequence[float]:
    """A number for each tensor, of one for all; None gives ones."""
    return numbers if isinstance(numbers, Sequence) else [1.0 if numbers is None else numbers] * count


def on_device(value, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """A number or 0-d tensor as a tensor on the device, without waiting for it, for kernels to load; None stays None.

    `dtype` is that of a number's tensor; a tensor keeps its own.
    """
    if isinstance(value, torch.Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    return None if value is None else torch.full((), value, dtype=dtype, device=device)


@jit
def locate(tiles):
    """(tensor, tile) of this program, int64."""
    pair = tiles + 2 * tl.program_id(0).to(tl.int64)
    return tl.load(pair).to(tl.int64), tl.load(pair + 1).to(tl.int64)


@jit
def number(entry):
    """The fp32 number that stands at an entry of the table."""
    return tl.load(entry).to(tl.int32).to(tl.float32, bitcast=True)


@jit
def allowed(size, found):
    """The size of a tensor, or 0 where the step is refused, so that nothing is written."""
    if found is not None:
        size = tl.where(tl.load(found) != 0, 0, size)
    return size


@jit
def given(scalar, otherwise, DTYPE: tl.constexpr):
    """A number that lies on the device, or `otherwise` where there is none."""
    if scalar is not None:
        otherwise = tl.load(scalar).to(DTYPE)
    return otherwise


@jit
def _pointer(address, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """A table's address as a pointer to elements of a dtype, to the bits of bf16."""
    if DTYPE == "float32":
        pointer = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == "float16":
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        tl.static_assert(DTYPE == "bfloat16")
        pointer = address.to(tl.pointer_type(tl.int16))
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def read(address, offsets, mask, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Elements at `offsets` from a table's address in fp32, 0 where the mask is false.

    DTYPE is the name of the dtype. WHOLE says that the address is a multiple of 16 bytes and the mask true everywhere, so that the elements of
    a thread are one access; the offsets must then be seen to start at a multiple of 16.
    """
    pointer = _pointer(address, DTYPE, WHOLE) + offsets
    if WHOLE:
        values = tl.load(pointer)
    else:
        values = tl.load(pointer, mask, 0)
    if DTYPE == "bfloat16":
        values = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@jit
def _store(pointer, values, mask, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointer, values)
    else:
        tl.store(pointer, values, mask)


@jit
def _top(values, noise):
    """The upper 16 bits of fp32 `values` after `noise` (below 2^16) is added to their bits.

    Infinities and NaN stay what they are; a NaN that arithmetic gave has its mark among the upper bits.
    """
    bits = values.to(tl.uint32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, bits + noise, bits)
    return (bits >> 16).to(tl.uint16).to(tl.int16, bitcast=True)


@jit
def write(address, offsets, values, mask, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Store fp32 values, rounded to the nearest of DTYPE, even ones in ties; arguments as those of `read`."""
    pointer = _pointer(address, DTYPE, WHOLE) + offsets
    if DTYPE == "bfloat16":
        odd = (values.to(tl.uint32, bitcast=True) >> 16) & 1
        _store(pointer, _top(values, 0x7FFF + odd), mask, WHOLE)
    else:
        _store(pointer, values.to(pointer.dtype.element_ty), mask, WHOLE)


@jit
def write_stochastic(address, offsets, values, mask, seed, counter, WHOLE: tl.constexpr):
    """Store fp32 values as bf16, rounded up or down by chance: to the bit what random.py's stochastic_round(values, seed, counter) gives.

    seed and counter are int64 scalars; the element at an offset is keyed on (seed, counter + offset).
    """
    index = counter + offsets
    none = (index * 0).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, index.to(tl.uint32), (index >> 32).to(tl.uint32), none + 1, none)
    _store(_pointer(address, "bfloat16", WHOLE) + offsets, _top(values, word & 0xFFFF), mask, WHOLE)


@jit
def write_weight(
    weight, param, offsets, values, mask, seed, counter, WEIGHT: tl.constexpr, PARAM: tl.constexpr, HAS_MASTERS: tl.constexpr, WHOLE: tl.constexpr
):
    """The new weights, rounded stochastically where they are bf16, and with masters the parameters' rounded copies of them."""
    if WEIGHT == "bfloat16":
        write_stochastic(weight, offsets, values, mask, seed, counter, WHOLE)
    else:
        write(weight, offsets, values, mask, WEIGHT, WHOLE)
    if HAS_MASTERS:
        write(param, offsets, values, mask, PARAM, WHOLE)
