"""Reading of the lists that come with benchmarks as MATLAB files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jlml_jax.errors import UserError

# In a process of its own: damaged bytes can lead SciPy's reader out of its memory, or to ask for all that there is.
_PROGRAM = """
import json, resource, sys
import scipy.io
resource.setrlimit(resource.RLIMIT_AS, (2 << 30,) * 2)
path, *names = sys.argv[1:]
try:
    variables = scipy.io.loadmat(path, variable_names=names, simplify_cells=True)
    text = json.dumps({name: variables[name] for name in names if name in variables}, default=lambda x: x.tolist())
except Exception as error:
    sys.exit(ascii(error))
print(text)
"""
_TIMEOUT = 60  # seconds; the lists take less than one


def read_mat(path: Path, *names: str) -> dict[str, Any]:
    """Variables `names` of a MATLAB file up to version 7: structs as dicts, cells and arrays as lists.

    Dimensions of 1 are dropped.

    Raises:
        UserError: it is no such file, is damaged, or lacks one of the variables.
    """
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # each thread would reserve memory
    try:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", _PROGRAM, str(path), *names], capture_output=True,
                              timeout=_TIMEOUT, env=environment)
        why = done.stderr.decode(errors="replace").strip() or f"its reader ended with status {done.returncode}"
    except subprocess.TimeoutExpired:
        done, why = None, f"not done in {_TIMEOUT} s"
    if done is None or done.returncode:
        raise UserError(f"{path} does not read as a MATLAB file ({why[-200:]}); copy the original file again")
    variables = json.loads(done.stdout)
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
