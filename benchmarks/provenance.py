"""Where a figure comes from: the command, the versions and the machine, as reports state them."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["command_line", "machine", "provenance", "versions"]


def command_line() -> str:
    """The command that runs now, as one would type it again."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def versions() -> str:
    """The versions of python and of the core packages."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("retract", "torch", "geoopt", "numpy"))
    return f"python {platform.python_version()}, {packages}"


def machine() -> str:
    """Processor, cores, threads that torch uses, and the accelerator if there is one."""
    parts = [
        _processor(),
        f"{os.cpu_count()} cores",
        f"{torch.get_num_threads()} torch threads",
        platform.system(),
    ]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def provenance(**facts: object) -> dict[str, str]:
    """Command, versions, machine, then ``facts``: seeds and what else a reader needs to repeat the run."""
    return {
        "command": command_line(),
        "versions": versions(),
        "machine": machine(),
        **{name: str(value) for name, value in facts.items()},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
