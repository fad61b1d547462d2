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
