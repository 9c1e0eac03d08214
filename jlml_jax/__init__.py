"""JLML person re-identification (Li, Zhu, Gong, IJCAI 2017) in JAX and Flax.

`load_extractor(workdir)` gives a trained run as a function from images to features.
"""

from typing import Any

__all__ = ["load_extractor"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from jlml_jax import extractor  # only now: it imports JAX

        return getattr(extractor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
