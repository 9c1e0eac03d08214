"""A command of jlml_jax on few drawn people: python -m experiments.faults.small main|search|prepare FLAGS"""

import importlib
import sys

from jlml_jax.datasets import synthetic_pedestrians

synthetic_pedestrians.TRAIN_IDENTITIES = range(1, 13)
synthetic_pedestrians.TEST_IDENTITIES = range(201, 207)

if __name__ == "__main__":
    command = importlib.import_module(f"jlml_jax.{sys.argv.pop(1)}")
    sys.exit(command.main())
