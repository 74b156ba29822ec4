"""The most memory that a process has held."""

from __future__ import annotations

import platform
from pathlib import Path


def peak_memory_mb() -> int | None:
    """The most memory this process has held; None where the system does not say (Windows)."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where getrusage gives a started process its parent's peak
        lines = status.read_text().splitlines()
        return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:")), None)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if platform.system() == "Darwin" else 1024)
