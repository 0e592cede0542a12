"""What a GPU says of itself through NVML, the library that nvidia-smi reads: load, power, heat, clocks, and what holds it back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_THROTTLED = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "heat, by software",
    0x40: "heat, by hardware",
    0x80: "power brake",
    0x200: "board limit",
    0x400: "reliability",
}
"""Bits of nvml.h's reasons for lower clocks. Others are no throttling: idle (1), clocks chosen by the user (2), a display's (0x100)."""


class GpuWatch:
    """The figures of one GPU, read at most every `every_s` seconds. Never raises: where there is no NVML it has nothing to say."""

    def __init__(self, device: torch.device, every_s: float = 10.0):
        self.every_s, self.latest = every_s, None
        self._next = 0.0
        self.nvml = self.handle = None
        if device.type == "cuda":
            try:
                import pynvml

                pynvml.nvmlInit()
                self.handle, self.nvml = _handle(pynvml, torch.cuda.get_device_properties(device)), pynvml
            except Exception:  # no package, no driver, or a board it does not know: training needs none of them
                self.nvml = None

    def read(self) -> dict[str, Any] | None:
        """New figures (`read_board`), or None where it is not yet time for them or there are none; `latest` keeps them."""
        if self.nvml is None or time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + self.every_s
        figures = read_board(self.nvml, self.handle)
        self.latest = figures if any(value is not None for value in figures.values()) else None
        return self.latest


def _handle(nvml: Any, properties: Any) -> Any:
    """NVML's handle of torch's device. Their numbers differ under CUDA_VISIBLE_DEVICES; the board's own identity does not."""
    for prefix in ("GPU-", "MIG-"):
        handle = ask(lambda prefix=prefix: nvml.nvmlDeviceGetHandleByUUID(f"{prefix}{properties.uuid}"))
        if handle is not None:
            return handle
    address = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    return nvml.nvmlDeviceGetHandleByPciBusId(address)


def read_board(nvml: Any, handle: Any) -> dict[str, Any]:
    """What a board says now; a figure that it does not give is None.

    gpu_utilisation [percent], gpu_watts, gpu_celsius, gpu_mhz (of the multiprocessors), gpu_memory_bytes (of all processes),
    gpu_ecc_errors (uncorrected, since the driver was loaded), gpu_throttled (why clocks are lowered, [] where they are not).
    """
    n, h = nvml, handle
    return dict(
        gpu_utilisation=ask(lambda: n.nvmlDeviceGetUtilizationRates(h).gpu),
        gpu_watts=ask(lambda: n.nvmlDeviceGetPowerUsage(h) / 1000),
        gpu_celsius=ask(lambda: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)),
        gpu_mhz=ask(lambda: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM)),
        gpu_memory_bytes=ask(lambda: n.nvmlDeviceGetMemoryInfo(h).used),
        gpu_ecc_errors=ask(lambda: n.nvmlDeviceGetTotalEccErrors(h, n.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, n.NVML_VOLATILE_ECC)),
        gpu_throttled=ask(lambda: _throttled(n.nvmlDeviceGetCurrentClocksThrottleReasons(h))),
    )


def ask(question: Callable[[], Any]) -> Any:
    """The answer, or None where the board or driver gives none, or the board is lost."""
    try:
        return question()
    except Exception:  # the package's errors are as many as drivers have faults: a figure less
        return None


def _throttled(reasons: int) -> list[str]:
    return [name for bit, name in _THROTTLED.items() if reasons & bit]
