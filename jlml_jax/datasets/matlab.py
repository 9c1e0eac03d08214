"""Reading of the lists that come with benchmarks as MATLAB files."""

import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jlml_jax.errors import UserError

# In a process of its own: damaged bytes can lead SciPy's reader out of its memory, or to ask for all that there is. It
# reads one file after another, and ends with the process that started it.
_PROGRAM = """
import contextlib, json, resource, sys
import scipy.io
with contextlib.suppress(ValueError):  # under a lower limit, or on macOS, which has none
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30,) * 2)
_, most = resource.getrlimit(resource.RLIMIT_CPU)
for line in sys.stdin:
    path, *names = json.loads(line)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + 60, most))  # seconds
    try:
        variables = scipy.io.loadmat(path, variable_names=names, simplify_cells=True)
        answer = json.dumps([{name: variables[name] for name in names if name in variables}, ""],
                            default=lambda x: x.tolist())
    except Exception as error:
        answer = json.dumps([{}, ascii(error)])
    print(answer, flush=True)
"""


@functools.cache
def _reader(_parent: int) -> subprocess.Popen:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # each thread would reserve memory
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", _PROGRAM], text=True, env=environment,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def read_mat(path: Path, *names: str) -> dict[str, Any]:
    """Variables `names` of a MATLAB file up to version 7: structs as dicts, cells and arrays as lists.

    Dimensions of 1 are dropped.

    Raises:
        UserError: it is no such file, is damaged, or lacks one of the variables.
    """
    reader = _reader(os.getpid())  # a forked process must not share its parent's
    with contextlib.suppress(BrokenPipeError):
        reader.stdin.write(json.dumps([str(path), *names]) + "\n")
        reader.stdin.flush()
    if line := reader.stdout.readline():
        variables, why = json.loads(line)
    else:
        _reader.cache_clear()
        variables, why = {}, f"its reader ended with status {reader.wait()}"
    if why:
        raise UserError(f"{path} does not read as a MATLAB file ({why[-200:]}); copy the original file again")
    missing = [name for name in names if name not in variables]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}; copy the original file again")
    return variables


def integers(values: Any) -> list[int]:
    """A MATLAB vector, of doubles as a rule, as integers; a ValueError if it is not one of whole numbers."""
    array = np.atleast_1d(np.asarray(values))
    if array.ndim != 1 or array.dtype.kind not in "iuf" or not np.array_equal(array, np.round(array)):
        raise ValueError("not a vector of whole numbers")
    return array.astype(np.int64).tolist()
