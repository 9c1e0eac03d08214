"""Reading of the lists that come with benchmarks as MATLAB files."""

from pathlib import Path
from typing import Any

import numpy as np
import scipy.io

from jlml_jax.errors import UserError


def read_mat(path: Path, *names: str) -> dict[str, Any]:
    """Variables `names` of a MATLAB file up to version 7: structs as dicts, cells as lists, dimensions of 1 dropped.

    Raises:
        UserError: it is no such file, is damaged, or lacks one of the variables.
    """
    try:
        variables = scipy.io.loadmat(path, variable_names=names, simplify_cells=True)
    except Exception as error:  # SciPy raises whatever the bytes lead it to
        raise UserError(f"{path} does not read as a MATLAB file ({error or type(error).__name__}); copy the original "
                        "file again") from error
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
