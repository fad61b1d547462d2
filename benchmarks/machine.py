"""What a benchmark ran on."""

import os
from pathlib import Path
import platform


def machine() -> str:
    """Cores and the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} × {name}"


def others() -> float:
    """Processes that wanted a core over the last minute: timings of a machine at work are rough."""
    return round(os.getloadavg()[0], 1)
