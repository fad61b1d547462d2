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


def memory_of(pid: int, key: str = "VmRSS") -> int:
    """Bytes of a process, its resident set or what else /proc has by this key; 0 where there is no such process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def cpu_seconds(pid: int) -> float:
    """That a process has used so far, its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_memory() -> int:
    """Bytes that processes can still have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
