"""Trains and evaluates: python -m jlml_jax.main [--config=configs/X.py] [--workdir=DIR] [--mode=M] [--config.k=v]

Examples:
  python -m jlml_jax.main                                       people drawn from a seed: no data, minutes on a CPU
  python -m jlml_jax.main --config=configs/market1501.py --config.train.batch_size=64
  python -m jlml_jax.main --config=configs/market1501.py --mode=evaluate
"""

import os
import sys
from pathlib import Path

# XLA tells of its own tuning flags as errors whenever it takes a CPU program from the compilation cache.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import flags
from ml_collections import config_flags

import configs
from jlml_jax.errors import UserError, exit_status
from jlml_jax.train import MODES, train_and_evaluate

_DEFAULT_CONFIG = str(Path(configs.__file__).parent / "synthetic.py")
_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config; configs/synthetic.py if not given.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; default runs/NAME, NAME being the config's name.")
_MODE = flags.DEFINE_enum("mode", MODES[0], MODES, "What to do.")


def _command() -> None:
    arguments = sys.argv[1:]
    if not any(argument.split("=")[0] in ("--config", "-config") for argument in arguments):
        arguments.insert(0, f"--config={_DEFAULT_CONFIG}")
    try:
        extra = flags.FLAGS([sys.argv[0], *arguments])[1:]
        config = _CONFIG.value
        workdir = _WORKDIR.value or f"runs/{config.name}"
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        raise UserError(f"{error}; see --help, and configs/default.py for every field") from error
    if extra:
        raise UserError(f"unexpected argument {extra[0]!r}; see --help")
    train_and_evaluate(config, workdir, _MODE.value)


def main() -> int:
    if "--help" in sys.argv:
        print(__doc__, flags.FLAGS.main_module_help(), sep="\n")
        return 0
    return exit_status(_command)


if __name__ == "__main__":
    sys.exit(main())
