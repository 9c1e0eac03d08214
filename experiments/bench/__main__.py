"""Benchmarks: python -m experiments.bench NAME [--json=FILE]

NAME is train, end_to_end, forward, towers, input, evaluate, galleries, few_crops or start. train, forward and input are
measured against PyTorch: pip install -e '.[bench]'.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from jlml_jax import parallel, provenance
from jlml_jax.errors import UserError, exit_status

# The function of experiments/bench that measures it, and the options that it takes.
BENCHMARKS = {
    "train": ("train_step.bench_train", ("height", "width", "batch_size", "dtype", "repeats")),
    "end_to_end": ("end_to_end.bench_end_to_end", ("height", "width", "batch_size", "dtype", "repeats")),
    "forward": ("forward.bench_forward", ("height", "width", "batch_size", "dtype", "repeats")),
    "towers": ("towers.bench_towers", ("height", "width", "batch_size", "dtype", "repeats")),
    "input": ("input_rate.bench_input", ("height", "width", "batch_size", "repeats")),
    "evaluate": ("ranking.bench_evaluate", ("repeats",)),
    "galleries": ("galleries.bench_galleries", ("queries",)),
    "few_crops": ("few_crops.bench_few_crops", ("repeats",)),
    "start": ("start.bench_start", ("repeats",)),
}


def _command() -> None:
    parser = argparse.ArgumentParser("python -m experiments.bench", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--height", type=int, default=128, help="pixels")
    parser.add_argument("--width", type=int, default=64, help="pixels")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of convolutions")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--queries", type=int, default=3_368, help="of galleries")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    parallel.keep_memory()  # as `python -m jlml_jax.main` does; PyTorch keeps its own
    path, names = BENCHMARKS[options.benchmark]
    module, function = path.split(".")
    try:
        measure = getattr(importlib.import_module(f"experiments.bench.{module}"), function)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UserError(f"{options.benchmark} is measured against PyTorch, which is not installed: "
                        "pip install -e '.[bench]'") from error
    result = measure(**{name: getattr(options, name) for name in names}) | {"provenance": provenance.collect()}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status(_command))
