"""Where a result comes from: versions, hardware, command and commit."""

import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets", "pillow")


def collect() -> dict[str, Any]:
    """JSON for `results.json`; the caller adds what it alone knows (seed, wall time, data)."""
    source = Path(__file__).parent
    spec = sys.modules["__main__"].__spec__  # None unless the process was started with -m
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    # An installed package may lie within another project's checkout, such as in its .venv.
    tracked = _git(source, "ls-files", "--error-unmatch", Path(__file__).name) is not None
    commit = _git(source, "rev-parse", "HEAD") if tracked else None
    return {
        "command": " ".join([program, *map(shlex.quote, sys.argv[1:])]),
        "commit": commit,
        "uncommitted_changes": bool(_git(source, "status", "--porcelain", "--", ".")) if commit else None,
        "source_sha256": _digest(source),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "hardware": {"platform": jax.default_backend(), "devices": jax.device_count(),
                     "device_kind": jax.devices()[0].device_kind, "processes": jax.process_count(),
                     "machine": platform.machine(), "cpus": _cpus()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _digest(folder: Path) -> str:
    """Of the package's own code, which a commit does not tell of an installed package or an edited checkout."""
    files = sorted(folder.rglob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says of the checkout that the package runs from; None where it is installed without one."""
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
