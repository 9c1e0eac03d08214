"""MATLAB files, which a process of its own reads."""

import os

import numpy as np
import pytest
import scipy.io

from jlml_jax.datasets import matlab
from jlml_jax.errors import UserError


@pytest.fixture
def new_reader():
    matlab._reader.cache_clear()
    yield
    matlab._reader.cache_clear()


def test_structs_are_dicts_and_arrays_are_lists(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", {"sets": {"train": np.array([[3.0, 5.0]])}, "other": 1})
    assert matlab.read_mat(tmp_path / "a.mat", "sets") == {"sets": {"train": [3.0, 5.0]}}
    with pytest.raises(UserError, match="has no partitions; copy the original file again"):
        matlab.read_mat(tmp_path / "a.mat", "sets", "partitions")


@pytest.mark.usefixtures("new_reader")
def test_a_system_that_limits_no_memory_reads_too(tmp_path, monkeypatch):
    """As macOS, or where a lower limit is set already."""
    (tmp_path / "sitecustomize.py").write_text("""
import resource
limit = resource.setrlimit
def setrlimit(kind, limits):
    if kind == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    limit(kind, limits)
resource.setrlimit = setrlimit
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    scipy.io.savemat(tmp_path / "a.mat", {"number": 7})
    assert matlab.read_mat(tmp_path / "a.mat", "number") == {"number": 7}


@pytest.mark.usefixtures("new_reader")
def test_a_reader_that_dies_is_told_and_another_one_reads_on(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", {"number": 7})
    matlab.read_mat(tmp_path / "a.mat", "number")
    reader = matlab._reader(os.getpid())
    reader.kill()
    reader.wait()
    with pytest.raises(UserError, match=r"a\.mat does not read as a MATLAB file \(its reader ended with status -9\)"):
        matlab.read_mat(tmp_path / "a.mat", "number")
    assert matlab.read_mat(tmp_path / "a.mat", "number") == {"number": 7}


def test_integers_are_whole_numbers_in_a_row():
    assert matlab.integers([3.0, 5.0]) == [3, 5] and matlab.integers(4.0) == [4]
    for values in ([1.5], [[1, 2], [3, 4]], ["a"], [np.nan]):
        with pytest.raises(ValueError, match="not a vector of whole numbers"):
            matlab.integers(values)
