"""Peaks of devices, against the arithmetic of their tensor cores, and by the whole name only."""

import pytest
import torch

from core.device_peaks import PEAKS, known_peak, peak_of

# Multiprocessors, boost clock in GHz, dense FLOPs a clock of one multiprocessor: of its tensor cores in 16 bits, and of
# its plain ones in fp32 (two a core: 64 cores of an A100, 128 of the others, and AMD's 256 by packed instructions).
CORES = {
    "NVIDIA A100-SXM4-40GB": (108, 1.41, 2048, 128),
    "NVIDIA A100-SXM4-80GB": (108, 1.41, 2048, 128),
    "NVIDIA A100-PCIE-40GB": (108, 1.41, 2048, 128),
    "NVIDIA A100-PCIE-80GB": (108, 1.41, 2048, 128),
    "NVIDIA A100 80GB PCIe": (108, 1.41, 2048, 128),
    "NVIDIA H100 80GB HBM3": (132, 1.83, 4096, 256),
    "NVIDIA H100 PCIe": (114, 1.62, 4096, 256),
    "NVIDIA H200": (132, 1.83, 4096, 256),
    "NVIDIA GH200 120GB": (132, 1.83, 4096, 256),
    "NVIDIA GH200 480GB": (132, 1.83, 4096, 256),
    "NVIDIA GH200 144G HBM3e": (132, 1.83, 4096, 256),
    "AMD Instinct MI300X": (304, 2.1, 2048, 256),
    "AMD Instinct MI300X OAM": (304, 2.1, 2048, 256),
    "NVIDIA L40S": (142, 2.52, 1024, 256),
    "NVIDIA GeForce RTX 4090": (128, 2.52, 512, 256),
    "NVIDIA GeForce RTX 5090": (170, 2.407, 512, 256),
}
# Sparse figures in 16 bits and in TF32, and the one in fp32, as data sheets print them: of those whose clock under load
# is not published.
SPARSE = {
    "NVIDIA H100 NVL": (1671, 835, 60),
    "NVIDIA H200 NVL": (1671, 835, 60),
    "NVIDIA B200": (36_000 / 8, 18_000 / 8, 600 / 8),
    "NVIDIA B300": (36_000 / 8, 18_000 / 8, 600 / 8),
    "NVIDIA B300 SXM6 AC": (36_000 / 8, 18_000 / 8, 600 / 8),
}


def peaks_of(name: str) -> list[float]:
    """In 16 bits, TF32 and fp32, in TFLOP/s."""
    kinds = (("bf16-mixed", False), ("32-true", True), ("32", False))
    return [(known_peak(name, *kind) or 0.0) / 1e12 for kind in kinds]


@pytest.mark.parametrize("name", CORES)
def test_a_peak_is_cores_times_clock(name: str) -> None:
    """Within 2 %, as data sheets round; fp32 within 10 %, whose clock may be a higher one."""
    multiprocessors, clock, flops, plain_flops = CORES[name]
    half, tf32, fp32 = peaks_of(name)
    assert half == pytest.approx(multiprocessors * clock * flops / 1e3, rel=0.02)
    assert known_peak(name, "16-true", False) == known_peak(name, "bf16-true", True) == half * 1e12
    assert tf32 == pytest.approx(half / 2, rel=0.02)
    assert fp32 == pytest.approx(multiprocessors * clock * plain_flops / 1e3, rel=0.1)


@pytest.mark.parametrize("name", SPARSE)
def test_or_half_of_the_sparse_one(name: str) -> None:
    half, tf32, fp32 = peaks_of(name)
    assert (2 * half, 2 * tf32, fp32) == pytest.approx(SPARSE[name])


def test_every_entry_is_tested_and_has_a_source() -> None:
    assert {peaks[:3] for peaks in PEAKS.values()} == {tuple(peaks_of(name)) for name in (*CORES, *SPARSE)}
    assert all(len(peaks.source) > 10 for peaks in PEAKS.values())


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H200 MIG 3g.71gb",
        "NVIDIA H20",
        "NVIDIA GB200",
        "NVIDIA L40",
        "Tesla V100-SXM2-16GB",
    ],
)
def test_of_another_device_nothing_is_known(name: str) -> None:
    assert known_peak(name, "bf16-mixed", False) is None


@pytest.mark.parametrize("precision", ["64-true", "transformer-engine", "transformer-engine-float16"])
def test_of_another_precision_neither(precision: str) -> None:
    assert known_peak("NVIDIA H200", precision, False) is None


def test_a_device_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 it depends on what torch is allowed."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    device = torch.device("cuda", 0)
    assert peak_of(torch.device("cpu"), "32-true") is None
    for allowed, peak in (("highest", 66.9e12), ("high", 494.7e12), ("medium", 494.7e12)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda allowed=allowed: allowed)
        assert peak_of(device, "32-true") == pytest.approx(peak)
        assert peak_of(device, "bf16-mixed") == 989.4e12
