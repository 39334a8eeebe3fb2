"""Where something is made: versions of the packages, git commit, hardware, device. Imports no torch by itself."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("ift_peft", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "tokenizers")


def versions() -> dict[str, str]:
    """Python and the packages that decide a run's outcome."""
    return {"python": platform.python_version()} | {package: version_of(package) for package in PACKAGES}


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def git_state() -> dict[str, Any] | None:
    """Commit of the working directory and whether it has uncommitted changes; None outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    return result.stdout.strip()


def hardware() -> dict[str, Any]:
    import psutil

    return {
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }


def made_on(device: torch.device) -> dict[str, Any]:
    """What, beside versions, decides the last bits of a result: the device and the threads that share its sums."""
    import torch

    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {
        "device": f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }
