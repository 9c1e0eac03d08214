"""JLML person re-identification (Li, Zhu, Gong, IJCAI 2017) in JAX and Flax.

`load_extractor(workdir)` gives a trained run as a function from images to features.
"""

import os
import signal
import sys
from typing import Any

# XLA tells of its own tuning flags as errors whenever it takes a CPU program from the compilation cache. JAX chooses
# another level when it is imported, so that a program which does that first has these lines.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Without a traceback, Ctrl-C ends a command during the seconds that its imports take. While Python looks for the module
# of `python -m jlml_jax.MODULE`, and then only, the program's name is -m.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

__all__ = ["load_extractor"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from jlml_jax import extractor  # only now: it imports JAX

        return getattr(extractor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
