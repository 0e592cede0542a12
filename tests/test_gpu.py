"""The GPU's figures, from an NVML that is played."""

import sys
import types

import pytest
import torch

from nanotrain.__main__ import main
from nanotrain.gpu import GpuWatch
from nanotrain.stages import pretrain
from tests.stages.test_pretrain import flags, rows_of

CUDA = torch.device("cuda")


def fake(**changes):
    """A pynvml with two boards, of which b is torch's first."""

    def by_uuid(uuid):
        return {"GPU-a": "board a", "GPU-b": "board b"}[uuid]

    def only(value):
        def ask(handle, *kind):
            assert handle == "board b"
            return value

        return ask

    module = types.ModuleType("pynvml")
    module.__dict__.update(
        NVML_TEMPERATURE_GPU=0, NVML_CLOCK_SM=1, NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1, NVML_VOLATILE_ECC=0, nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid, nvmlDeviceGetHandleByPciBusId=lambda address: {"00000000:3b:00.0": "board b"}[address],
        nvmlDeviceGetUtilizationRates=only(types.SimpleNamespace(gpu=97)), nvmlDeviceGetPowerUsage=only(412_345),
        nvmlDeviceGetTemperature=only(66), nvmlDeviceGetClockInfo=only(1980), nvmlDeviceGetMemoryInfo=only(types.SimpleNamespace(used=9 << 30)),
        nvmlDeviceGetTotalEccErrors=only(0), nvmlDeviceGetCurrentClocksThrottleReasons=only(0x1 | 0x4 | 0x40),
    )  # fmt: skip
    module.__dict__.update(changes)
    return module


@pytest.fixture
def watch(monkeypatch):
    """watch(uuid, **changes of pynvml) -> a GpuWatch."""

    def make(uuid="b", **changes):
        monkeypatch.setitem(sys.modules, "pynvml", fake(**changes))
        properties = types.SimpleNamespace(uuid=uuid, pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return GpuWatch(CUDA, every_s=0.0)

    return make


def lost(*arguments):
    raise RuntimeError("GPU is lost")


FIGURES = dict(gpu_utilisation=97, gpu_watts=412.345, gpu_celsius=66, gpu_mhz=1980, gpu_memory_bytes=9 << 30, gpu_ecc_errors=0,
               gpu_throttled=["power cap", "heat, by hardware"])  # fmt: skip


@pytest.mark.parametrize("uuid", ["b", "unknown to NVML"])
def test_the_board_is_found_by_its_identity_or_its_address(watch, uuid):
    assert watch(uuid).read() == FIGURES


@pytest.mark.parametrize("reasons", [0, 0x1, 0x2, 0x103])
def test_idle_is_no_throttling(watch, reasons):
    assert watch(nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: reasons).read()["gpu_throttled"] == []


def test_a_figure_the_board_does_not_give_is_none(watch):
    assert watch(nvmlDeviceGetTotalEccErrors=lost, nvmlDeviceGetPowerUsage=lost).read() == FIGURES | dict(gpu_ecc_errors=None, gpu_watts=None)


def test_a_board_that_is_lost_ends_nothing(watch):
    there = watch()
    there.read()
    for name in [name for name in vars(there.nvml) if name.startswith("nvmlDevice")]:
        setattr(there.nvml, name, lost)
    assert there.read() is None and there.latest is None


def test_it_is_asked_every_ten_seconds(watch, monkeypatch):
    there, now = watch(), [100.0]
    monkeypatch.setattr("nanotrain.gpu.time.monotonic", lambda: now[0])
    there.every_s, read = 10.0, []
    for second in range(31):
        now[0] = 100.0 + second
        read += [second] if there.read() else []
    assert read == [0, 10, 20, 30] and there.latest == FIGURES


@pytest.mark.parametrize("why", [dict(nvmlInit=lost), dict(nvmlDeviceGetHandleByUUID=lost, nvmlDeviceGetHandleByPciBusId=lost), None, "no package"])
def test_without_a_gpu_a_driver_or_the_package_there_is_nothing(watch, monkeypatch, why):
    if isinstance(why, dict):
        there = watch(**why)
    else:
        monkeypatch.setitem(sys.modules, "pynvml", None)  # an import of it fails
        there = GpuWatch(CUDA if why else torch.device("cpu"))
    assert there.read() is None and there.latest is None


def test_a_run_writes_them_as_rows_and_on_its_lines(watch, data, tmp_path, monkeypatch):
    there = watch()
    monkeypatch.setattr(pretrain, "GpuWatch", lambda device: there)
    assert main(flags(data, tmp_path / "r", "--train.steps=3")) == 0
    assert rows_of(tmp_path / "r", "gpu_watts") == [{"step": n} | FIGURES for n in (1, 2, 3)] and len(rows_of(tmp_path / "r")) == 3
    lines = [line for line in (tmp_path / "r/log.txt").read_text().splitlines() if " loss " in line]
    assert len(lines) == 3 and all(line.endswith("  gpu  97%  412 W  66 C") for line in lines)
