"""Benchmarks: python -m experiments.bench train|evaluate|galleries [--json=FILE]"""

import argparse
import json
from pathlib import Path

from experiments.bench import galleries, ranking, train_step
from jlml_jax import provenance


def main() -> None:
    parser = argparse.ArgumentParser("python -m experiments.bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("benchmark", choices=["train", "evaluate", "galleries"])
    parser.add_argument("--height", type=int, default=128, help="pixels, of train")
    parser.add_argument("--width", type=int, default=64, help="pixels, of train")
    parser.add_argument("--batch_size", type=int, default=32, help="of train")
    parser.add_argument("--repeats", type=int, default=15, help="of train and evaluate")
    parser.add_argument("--queries", type=int, default=ranking.NUM_QUERIES, help="of galleries")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    if args.benchmark == "train":
        result = train_step.bench_train(args.height, args.width, args.batch_size, args.repeats)
    elif args.benchmark == "galleries":
        result = galleries.bench_galleries(args.queries)
    else:
        result = ranking.bench_evaluate(args.repeats)
    result |= {"provenance": provenance.collect()}
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
