"""What this machine can do: its matrix rate, its instructions for bf16, its memory."""

from __future__ import annotations

import resource
import statistics
import sys
from pathlib import Path

import psutil
import torch

from gtsa.pretraining.step_phases import device_clock

CPU = Path("/proc/cpuinfo")  # of Linux
KINDS = {"32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def has_bf16(device: torch.device) -> bool:
    """Whether the processor or the GPU has instructions for products of bf16 matrices."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        words = CPU.read_text().split()
    except OSError:  # not Linux: macOS's processors from the M2 on have them, which nothing reports
        return False
    return bool({"amx_bf16", "avx512_bf16", "bf16"} & set(words))


def matrix_rate(precision: str, device: torch.device) -> float:
    """Floating-point operations a second in a product of square matrices: the median of five."""
    side = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=KINDS[precision]) for _ in range(2))
    clock, taken = device_clock(device), []
    for _ in range(6):
        began = clock()
        torch.mm(a, b)
        taken.append(clock() - began)
    return 2 * side**3 / statistics.median(taken[1:])


def memory(device: torch.device) -> dict[str, float]:
    """Bytes: the largest use so far, and all that there is."""
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        total = psutil.virtual_memory().total
    return {"peak": peak, "total": total, "share": peak / total}
