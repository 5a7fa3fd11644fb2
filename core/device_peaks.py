"""Lists how many FLOP/s a device's matrix products reach at most: dense, by its makers' data sheets.

Lightning's table is not used: of "NVIDIA H200" it knows nothing, its H200 SXM and NVL are the sparse figures, its H100
NVL is a pair of cards, and its RTX 4090 computes bf16 at fp32's rate.
"""

import re
from typing import NamedTuple

import torch


class Peaks(NamedTuple):
    """Holds the dense peaks of one device, in TFLOP/s; products of 16 bits are summed in fp32.

    Attributes:
        half: of bf16 and fp16.
        tf32: of fp32 in TF32, which torch.set_float32_matmul_precision("high") allows.
        fp32: of fp32 without TF32.
        source: the makers' paper.
    """

    half: float
    tf32: float
    fp32: float
    source: str


HOPPER = "NVIDIA H100 Tensor Core GPU Architecture, v1.04"
HGX = "NVIDIA HGX platform, specifications, per GPU; TF32 and 16 bits are given with sparsity and halved here"
PEAKS = {
    r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe": Peaks(312.0, 156.0, 19.5, "NVIDIA A100 data sheet, 2021"),
    r"H100 80GB HBM3": Peaks(989.4, 494.7, 66.9, HOPPER),
    r"H100 PCIe": Peaks(756.0, 378.0, 51.2, HOPPER),
    r"H100 NVL": Peaks(835.5, 417.5, 60.0, "NVIDIA H100 NVL data sheet, one card, halved from sparse"),
    r"H200": Peaks(989.4, 494.7, 66.9, "NVIDIA H200 data sheet, SXM: the H100's figures, halved from sparse"),
    r"H200 NVL": Peaks(835.5, 417.5, 60.0, "NVIDIA H200 data sheet, NVL, halved from sparse"),
    r"GH200 (120GB|480GB|144G HBM3e)": Peaks(989.4, 494.7, 66.9, "NVIDIA GH200 data sheet: likewise"),
    r"B200": Peaks(2250.0, 1125.0, 75.0, HGX),
    r"B300( SXM6 AC)?": Peaks(2250.0, 1125.0, 75.0, HGX),
    r"AMD Instinct MI300X( OAM)?": Peaks(1307.4, 653.7, 163.4, "AMD Instinct MI300X data sheet, 2023"),
    r"L40S": Peaks(362.05, 183.0, 91.6, "NVIDIA L40S data sheet, 2023"),
    r"GeForce RTX 4090": Peaks(165.2, 82.6, 82.6, "NVIDIA Ada GPU Architecture, v2.1, appendix A"),
    r"GeForce RTX 5090": Peaks(209.5, 104.8, 104.8, "NVIDIA RTX Blackwell GPU Architecture, v1.1, appendix A"),
}
"""By the whole name that the driver gives, without NVIDIA: a laptop's part or a slice (MIG) is another device."""


def known_peak(device_name: str, precision: str, tf32: bool) -> float | None:
    """Return a device's dense peak in FLOP/s; None: it is not known, and nothing similar stands in for it.

    Args:
        device_name: as torch.cuda.get_device_name gives it.
        precision: trainer.precision.
        tf32: whether products of fp32 are made in TF32.
    """
    name = device_name.removeprefix("NVIDIA ")
    peaks = next((peaks for pattern, peaks in PEAKS.items() if re.fullmatch(pattern, name)), None)
    kind = precision.partition("-")[0]
    if peaks is None or kind not in ("16", "bf16", "32"):
        return None
    tera = peaks.half if kind != "32" else peaks.tf32 if tf32 else peaks.fp32
    return tera * 1e12


def peak_of(device: torch.device, precision: str) -> float | None:
    """Return the peak of a device of this machine, in FLOP/s; None: it is not known, as of every CPU."""
    if device.type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(device), precision, torch.get_float32_matmul_precision() != "highest")
