"""Processes of their own: their environment, programs given as text, and a Python without TensorFlow."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# As where TensorFlow is not installed: TFDS also asks importlib.util.find_spec, which must find nothing, not raise.
WITHOUT_TENSORFLOW = """
import importlib.machinery, sys
class WithoutTensorFlow(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "tensorflow" else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = WithoutTensorFlow
"""


def child_environment(**variables):
    """That of the tests with `variables`, in which the package is found from any folder."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | variables


def run_program(program, *arguments, timeout=120, cwd=None, **variables):
    """Runs the text of a Python program to its end; gives its returncode, stdout and stderr."""
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True,
                          timeout=timeout, cwd=cwd, env=child_environment(**variables))
