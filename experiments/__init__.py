"""What was measured, and the commands that measure it."""

import jlml_jax  # noqa: F401 - first of all, so that Ctrl-C while a command imports ends it as it ends those of jlml_jax
