"""Table 13: parameters and operations of JLML, counted from the network that is trained here."""

import csv
import dataclasses
import functools
import io
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from experiments.tables import published
from experiments.tables.report import markdown_table
from jlml_jax import provenance
from jlml_jax.models import JLML, check_input_size, count_operations

PAPER_SIZE = (224, 224)  # height and width of the images that Table 13 is for


@dataclasses.dataclass(frozen=True)
class Size:
    """What a network costs, without its identity layers, which depend on the number of people."""

    multiply_adds: int  # an image, of convolutions and fully connected layers
    xla_operations: float  # floating-point operations an image as XLA counts them
    parameters: int
    depth: int  # as the paper counts: conv1, the convs along a tower, the feature fc, the identity fc
    streams: int


def measure(config: ml_collections.ConfigDict, height: int, width: int) -> Size:
    """Counts the evaluation forward of `config.model` on one image; computes nothing but shapes."""
    check_input_size(height, width, config.model.num_strips)
    model = JLML(0, **config.model)
    variables, multiply_adds = trace(model, height, width)
    towers = [name for name in variables["params"] if "tower" in name]
    convs = sum(layer in ("conv1", "conv2", "conv3") for unit in variables["params"][towers[0]].values()
                for layer in unit)
    return Size(multiply_adds, count_operations(model, height, width) or math.nan,
                sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])), 1 + convs + 2,
                len(towers))


def trace(model: JLML, height: int, width: int) -> tuple[dict[str, Any], int]:
    """The shapes of the variables, and the multiply-adds of one image's evaluation forward."""
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    variables = jax.eval_shape(functools.partial(model.init, capture_intermediates=True, mutable=True),
                               jax.random.key(0), images)
    outputs = {tuple(key.key for key in path[:-2]): leaf.shape
               for path, leaf in jax.tree_util.tree_leaves_with_path(variables.pop("intermediates"))
               if path[-2].key == "__call__"}
    multiply_adds = 0
    for path, kernel in jax.tree_util.tree_leaves_with_path(variables["params"]):
        *module, leaf = (key.key for key in path)
        if leaf == "kernel":  # every output value costs its kernel's inputs
            multiply_adds += math.prod(outputs[tuple(module)]) * math.prod(kernel.shape[:-1])
    return variables, multiply_adds


def write(config: ml_collections.ConfigDict) -> tuple[str, str]:
    """Table 13 in Markdown and CSV; ours at the paper's image size and, if it is another, at the config's."""
    table = published.load("13")
    paper = dict(zip((column.score for column in table.columns), table.rows["JLML-ResNet39"], strict=True))
    sizes = list(dict.fromkeys([PAPER_SIZE, (config.data.height, config.data.width)]))
    ours = {f"ours, {height}x{width}": measure(config, height, width) for height, width in sizes}

    body = [[line, f"{operations:.2e}", "", f"{parameters:.1f}", str(depth), str(streams)]
            for line, (operations, parameters, depth, streams) in table.rows.items()]
    body += [[line, f"{size.multiply_adds:,}", f"{size.xla_operations:.4g}", f"{size.parameters / 1e6:.2f}",
              str(size.depth), str(size.streams)] for line, size in ours.items()]
    source = provenance.collect()
    at_paper_size = next(iter(ours.values()))
    text = "\n\n".join([
        f"### Table 13: {table.title}",
        "FLOPs of the paper's lines are as printed; its figure for ResNet50 is multiply-adds, so that ours to compare "
        "are the multiply-adds. XLA counts a multiply-add as two and leaves padding out. Ours are counted from the "
        "network, identity layers left out.",
        markdown_table(["network", "FLOPs; multiply-adds", "operations, XLA", "parameters (million)", "depth",
                        "streams"], body),
        f"Ours at the paper's image size, less the paper's JLML-ResNet39: "
        f"{at_paper_size.multiply_adds - paper['multiply_adds']:+.3g} multiply-adds "
        f"({at_paper_size.multiply_adds / paper['multiply_adds']:.2f} times), "
        f"{at_paper_size.parameters / 1e6 - paper['parameters']:+.2f} million parameters.",
        f"Counted at commit {(source['commit'] or 'unknown')[:7]}"
        f"{' with changes' if source['uncommitted_changes'] else ''}, jax {source['versions']['jax']}."]) + "\n"

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "line", "score", "unit", "paper", "citation", "ours", "difference"])
    for line, values in table.rows.items():
        for column, value in zip(table.columns, values, strict=True):
            writer.writerow([13, line, column.score, column.unit, f"{value:g}", published.citation(line), "", ""])
    for line, size in ours.items():
        values = dataclasses.asdict(size) | {"parameters": size.parameters / 1e6}
        for score, value in values.items():
            known = score in paper and size is at_paper_size
            writer.writerow([13, line, score, "million" if score == "parameters" else "", "", "", value,
                             f"{value - paper[score]:g}" if known else ""])
    return text, out.getvalue()
