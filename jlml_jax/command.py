"""What one call of `train.train_and_evaluate` works on: the command, and the runs of its trials."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import ml_collections
import optax
from jax.sharding import Mesh

from jlml_jax import evaluate, norm_statistics
from jlml_jax.checkpoints import SavedRun
from jlml_jax.distances import Products
from jlml_jax.evaluate import Forward
from jlml_jax.kept_step import KeptStep
from jlml_jax.norm_statistics import Statistics
from jlml_jax.protocols import Trial
from jlml_jax.train_step import make_train_step


@dataclasses.dataclass(frozen=True)
class Command:
    """What the runs of all trials have in common."""

    mode: str
    mesh: Mesh
    optimizer: optax.GradientTransformation
    other_tests: list[list[Trial]]  # for each data set of evaluate.datasets, its trials
    provenance: dict[str, Any]
    # Trials differ in their images: what is compiled for one serves the others. By what it was made of.
    programs: dict[Any, Callable] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """One trial's run, checked but not begun."""

    command: Command
    given_config: ml_collections.ConfigDict
    config: ml_collections.ConfigDict  # with data.loader resolved
    workdir: Path
    trial: Trial
    model: nn.Module
    initial: SavedRun | None  # the run whose weights to start from, unless this one has a checkpoint
    label_map: dict[str, Any]

    def train_step(self, from_device_data: bool, num_steps: int) -> KeptStep:
        """`train_step.make_train_step`, whose trace is kept."""
        def make(config: ml_collections.FrozenConfigDict) -> KeptStep:
            command, form = self.command, (from_device_data, num_steps)
            made_of = [config[part].to_json() for part in ("augment", "data", "loss", "model", "optim", "train")]
            return KeptStep(make_train_step(config, self.model, command.optimizer, command.mesh, *form),
                            f"{made_of} {self.model} {command.mesh} {form}", command.provenance,
                            config.compilation_cache)
        return self._program(make, from_device_data, num_steps)

    def forward(self, output: str = "features") -> Forward:
        """`evaluate.make_forward`."""
        return self._program(lambda config: evaluate.make_forward(self.model, config, self.command.mesh, output),
                             output)

    def statistics(self) -> Statistics:
        """`norm_statistics.make_statistics`."""
        return self._program(lambda config: norm_statistics.make_statistics(self.model, config, self.command.mesh),
                             "statistics")

    def products(self) -> Products:
        """`evaluate.products_on`."""
        return self._program(lambda config: evaluate.products_on(self.command.mesh), "products")

    def _program(self, make: Callable[[ml_collections.FrozenConfigDict], Any], *name: Any) -> Any:
        config = self.config.copy_and_resolve_references()
        config.data.trials = ""
        config = ml_collections.FrozenConfigDict(config)
        key = config, self.model, *name
        if key not in self.command.programs:
            self.command.programs[key] = make(config)
        return self.command.programs[key]
