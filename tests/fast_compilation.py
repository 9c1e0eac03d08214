"""Nothing here may import JAX, which reads these once."""

# The tests compile far more than they run: machine code that takes less time to make, and a little more to run.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
