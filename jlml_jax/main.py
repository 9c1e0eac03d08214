"""Trains and evaluates: python -m jlml_jax.main [--config=configs/X.py] [--workdir=DIR] [--mode=M] [--config.k=v]

configs/default.py has every field k. The same command continues a run that was stopped.

Examples:
  python -m jlml_jax.main                                       people drawn from a seed: no data, minutes on a CPU
  python -m jlml_jax.main --config=configs/market1501.py --config.train.batch_size=64 --config.optim.learning_rate=0.02
  python -m jlml_jax.main --config=configs/market1501.py --mode=evaluate
  srun python -m jlml_jax.main --config=configs/market1501.py   many hosts: the same command on each; on Kubernetes and
                                                                Cloud TPU likewise, elsewhere with the three flags
  python -m jlml_jax.main --coordinator=10.0.0.1:8476 --num_processes=2 --process_id=0
"""

import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import config_flags

import configs
from jlml_jax import parallel
from jlml_jax.config_fields import refuse_unknown_field
from jlml_jax.errors import UserError
from jlml_jax.train import MODES, train_and_evaluate

_CONFIGS = Path(configs.__file__).parent
_DEFAULT_CONFIG = str(_CONFIGS / "synthetic.py")
_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config; configs/synthetic.py if not given.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; default runs/NAME, NAME being the config's name.")
_MODE = flags.DEFINE_enum("mode", MODES[0], MODES, "What to do.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no scheduler tells it.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes run this command, likewise.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0, likewise.")
_JOIN_TIMEOUT = flags.DEFINE_float("join_timeout", 60, "Seconds within which all processes must have started.")


def _found(config: str) -> str:
    """What --config is given, PATH or PATH:ARGUMENT; configs/X.py is the package's, where the folder here has none.

    A UserError if there is no such file, where absl would tell of how it looked for one.
    """
    path = config.partition(":")[0]
    if Path(path).exists():
        return config
    if Path(path).parent == Path("configs") and (_CONFIGS.parent / path).exists():
        return str(_CONFIGS.parent / config)
    names = ", ".join(sorted(file.name for file in _CONFIGS.glob("[a-z]*.py")))
    raise UserError(f"there is no config {path!r} here; {_CONFIGS} has {names}")


def _in_config(error: BaseException | None) -> str:
    """What a config file raised, and in which of its lines, if `error`, which may be absl's own, is due to one."""
    while error is not None:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if frame.name == "get_config":
                return f"{frame.filename}, line {frame.lineno}: {type(error).__name__}: {error}"
        error = error.__context__
    return ""


def _command() -> None:
    arguments = sys.argv[1:]
    given = [number for number, argument in enumerate(arguments) if argument.split("=")[0] in ("--config", "-config")]
    for number in given:
        flag, equals, config = arguments[number].partition("=")
        if equals:
            arguments[number] = f"{flag}={_found(config)}"
        else:
            arguments[number + 1:number + 2] = map(_found, arguments[number + 1:number + 2])
    if not given:
        arguments.insert(0, f"--config={_DEFAULT_CONFIG}")
    try:
        extra = flags.FLAGS([sys.argv[0], *arguments])[1:]
        config = _CONFIG.value
        workdir = _WORKDIR.value or f"runs/{config.name}"
        config.to_json()  # which a run's folder needs: a tuple may hold anything that Python writes, such as 1j
    # A config file of the user's own may raise anything; absl looks for a flag like one of thousands of letters.
    except Exception as error:
        if isinstance(error, LookupError | AttributeError):
            refuse_unknown_field(arguments)
        raise UserError(f"{_in_config(error) or error}; see --help, and configs/default.py for every field") from error
    if extra:
        raise UserError(f"unexpected argument {extra[0]!r}; see --help")
    parallel.keep_memory()
    parallel.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _JOIN_TIMEOUT.value)
    train_and_evaluate(config, workdir, _MODE.value)


def main() -> int:
    if {"-h", "--help"} & {*sys.argv}:
        print(__doc__, flags.FLAGS.main_module_help(), sep="\n")
        return 0
    return parallel.exit_status(_command)


if __name__ == "__main__":
    sys.exit(main())
