"""Model FLOP utilisation: the fraction of a device's peak spent on the model's matrix products.

pairs, length of their texts -> FLOPs of forward and backward -> / seconds / peak
"""

import re

import torch

from leanclip.config.model import ModelConfig
from leanclip.model.cost import forward_gflops

# 10^12 FLOPs per second of dense products: bf16 and fp16 on tensor cores with float32 sums, fp32 on
# the other cores, fp32 as TF32 on tensor cores (None: not supported). From NVIDIA's data sheets of
# each product; of the GeForce cards from the appendices of the GA102 and Ada architecture white
# papers. Numbers "with sparsity" are halved.
PEAKS: dict[str, tuple[float | None, float | None, float, float | None]] = {
    r"H200": (989.0, 989.0, 67.0, 494.5),
    r"H100 PCIe": (756.0, 756.0, 51.0, 378.0),
    r"H100 80GB HBM3": (989.0, 989.0, 67.0, 494.5),
    r"A100": (312.0, 312.0, 19.5, 156.0),
    r"A40": (149.7, 149.7, 37.4, 74.8),
    r"A10": (125.0, 125.0, 31.2, 62.5),
    r"L40S": (362.0, 362.0, 91.6, 183.0),
    r"L4": (121.0, 121.0, 30.3, 60.0),
    r"V100-SXM2": (None, 125.0, 15.7, None),
    r"T4": (None, 65.0, 8.1, None),
    r"RTX 3090": (71.0, 71.0, 35.6, 35.6),
    r"RTX 4090": (165.2, 165.2, 82.6, 82.6),
}
PRECISIONS = ("bf16", "fp16", "fp32", "tf32")  # columns of PEAKS


def peak_teraflops(device_name: str, precision: str, *, tf32: bool = False) -> float | None:
    """The peak of a device by the name that CUDA gives it; None if it is not in the table.

    With `tf32`, that of fp32 is TF32's, where the device supports it.
    """
    for name, peaks in PEAKS.items():
        # "L4" is not "L40", "A100" is "A100-SXM4-80GB", a laptop's RTX 4090 is another chip.
        if re.search(rf"\b{name}(?![\w ]*(Laptop|Ti|D)\b)\b", device_name):
            tf32_peak = peaks[-1] if tf32 and precision == "fp32" else None
            return tf32_peak or peaks[PRECISIONS.index(precision)]
    return None


class Utilisation:
    """Adds up the FLOPs of this rank's steps; reports nothing if the device's peak is unknown."""

    def __init__(
        self, model: ModelConfig, device: torch.device, precision: str, *, tf32: bool = False
    ) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._model, self._peak = model, peak_teraflops(name, precision, tf32=tf32)
        self._by_lengths: dict[tuple[int, int | None], float] = {}
        self._gflops = 0.0

    def add(self, pairs: int, length: int, patches: int | None = None) -> None:
        """Add a step on `pairs` with texts of `length` tokens, and images of `patches` (NaFlex)."""
        if self._peak is None:
            return
        lengths = length, patches
        if lengths not in self._by_lengths:
            self._by_lengths[lengths] = forward_gflops(self._model, *lengths)
        self._gflops += 3 * pairs * self._by_lengths[lengths]  # backward is twice forward

    def fraction(self, seconds: float) -> dict[str, float]:
        """`train/flop_utilisation` of the steps since the last call, if the peak is known."""
        gflops, self._gflops = self._gflops, 0.0
        if self._peak is None:
            return {}
        return {"train/flop_utilisation": gflops / 1e3 / seconds / self._peak}
