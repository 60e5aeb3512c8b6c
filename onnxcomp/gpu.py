"""Memory that a process takes on an NVIDIA GPU, as `nvidia-smi` tells it; nothing where there is none."""

from __future__ import annotations

import shutil
import subprocess

__all__ = ["device_memory", "parse_device", "parse_processes", "process_memory"]

_MIB = 1 << 20
_SECONDS = 10.0


def process_memory(pid: int) -> int | None:
    """Bytes that the process `pid` holds on all GPUs; None where that cannot be told, as in most containers."""
    text = _ask("--query-compute-apps=pid,used_memory")
    return None if text is None else parse_processes(text, pid)


def device_memory() -> int | None:
    """Bytes in use on the first GPU, by everybody; None where there is none."""
    text = _ask("--query-gpu=memory.used")
    return None if text is None else parse_device(text)


def parse_processes(text: str, pid: int) -> int | None:
    """The sum of the lines "PID, MIB" of one process; None if it is not among them."""
    rows = [line.split(",") for line in text.splitlines() if line.count(",") == 1]
    own = [used.strip() for number, used in rows if number.strip() == str(pid)]
    return sum(map(int, own)) * _MIB if own and all(map(str.isdigit, own)) else None


def parse_device(text: str) -> int | None:
    """The first line, in MiB."""
    first = (text.splitlines() or [""])[0].strip()
    return int(first) * _MIB if first.isdigit() else None


def _ask(query: str) -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
