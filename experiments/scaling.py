"""Scaling on paper: what a step computes and sends, where a slice of chips stops scaling, how long pre-training takes.

python -m experiments.scaling --json=experiments/results/scaling.json --output=experiments/results/scaling.md

Counts are those of the network itself, ImageNet's 1,000 classes at 224x224; the decode rate is measured here; peaks and
bandwidths are the vendors'. All else is an assumption, and is named.
"""

import dataclasses
import io
import json
import math
import os
import time
from pathlib import Path

import jax
import ml_collections
import numpy as np
from PIL import Image

from configs import imagenet
from experiments.tables import size
from experiments.tables.report import markdown_table
from jlml_jax import input_pipeline, provenance
from jlml_jax.arguments import Parser
from jlml_jax.datasets.split import Split
from jlml_jax.models import build_model

NUM_CLASSES = 1_000
GLOBAL_BATCH = 32  # the paper's
UTILISATIONS = (0.05, 0.15, 0.3)  # of the peak, by the convolutions of 16 to 512 channels; an assumption
LARGE_BATCH = 64  # a device, for comparison
_FLOAT = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one train step does, counted from the network."""

    parameters: int
    gradient_reductions: int  # all-reduces, one an array
    norm_layers: int
    norm_channels: int  # of all BN layers together
    norm_sequence: int  # BN layers that wait for one another; those of towers side by side can be reduced together
    multiply_adds: int  # of an image's forward

    @property
    def gradient_bytes(self) -> int:
        """All-reduced a step."""
        return _FLOAT * self.parameters

    @property
    def norm_bytes(self) -> int:
        """All-reduced a step: two moments a channel, and in the backward pass their gradients."""
        return 2 * 2 * _FLOAT * self.norm_channels

    @property
    def norm_reductions(self) -> int:
        """All-reduces a step, one a layer and direction."""
        return 2 * self.norm_layers

    @property
    def operations(self) -> int:
        """Floating-point operations of an image's training: two a multiply-add, backward taken for twice forward."""
        return 3 * 2 * self.multiply_adds


def count(config: ml_collections.ConfigDict, num_classes: int) -> Counts:
    """Computes nothing but shapes."""
    variables, multiply_adds = size.trace(build_model(config, num_classes), config.data.height, config.data.width)
    params = variables["params"]
    means = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(variables["batch_stats"])
             if path[-1].key == "mean"]
    # A shortcut's norm needs not be waited for: its convolution runs beside the unit's three.
    towers = {path[0].key for path, _ in means}
    in_line = {tower: sum(path[0].key == tower and "shortcut" not in jax.tree_util.keystr(path) for path, _ in means)
               for tower in towers}
    stems = sum(number for tower, number in in_line.items() if "tower" not in tower)
    return Counts(
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        gradient_reductions=len(jax.tree.leaves(params)), norm_layers=len(means),
        norm_channels=sum(leaf.shape[0] for _, leaf in means),
        norm_sequence=stems + max(number for tower, number in in_line.items() if "tower" in tower),
        multiply_adds=multiply_adds)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices that train together; the vendors' figures, and what is assumed of them."""

    name: str
    devices: int
    processes: int  # that feed them: hosts or virtual machines
    peak: float  # floating-point operations a second and device, in the type that convolutions of float32 are run in
    peak_of: str
    links: float  # bytes a second and device over all links, both directions together
    share: float  # of `links` that an all-reduce is assumed to use at a time
    latency: tuple[float, float]  # seconds of an all-reduce of a few kilobytes: assumed, at best and at worst
    source: str

    def reduce_seconds(self, num_bytes: float) -> float:
        """A ring all-reduce: every device sends 2 (n - 1) / n of the bytes."""
        return 2 * (self.devices - 1) / self.devices * num_bytes / (self.share * self.links)


_H100 = "https://www.nvidia.com/en-us/data-center/h100/"
SLICES = (
    Slice("v5e, 16 chips", 16, 4, 197e12, "bfloat16", 400e9, 0.25, (5e-6, 20e-6),
          "https://docs.cloud.google.com/tpu/docs/v5e"),
    Slice("v6e, 16 chips", 16, 4, 918e12, "bfloat16", 800e9, 0.25, (5e-6, 20e-6),
          "https://docs.cloud.google.com/tpu/docs/v6e"),
    Slice("8 x H100 SXM, NVLink", 8, 1, 989e12, "bfloat16, no sparsity", 900e9, 0.5, (10e-6, 30e-6), _H100),
)


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of one step of one batch."""

    compute: float
    gradients: float  # all-reduced, beside the backward pass or after it
    norms: float  # all-reduced, waited for

    @property
    def total(self) -> float:
        """With nothing overlapped."""
        return self.compute + self.gradients + self.norms


def step_of(counts: Counts, where: Slice, batch_per_device: float, utilisation: float, latency: float) -> Step:
    """Gradients are taken to be joined into one all-reduce, as XLA joins them; BN's wait for one another."""
    waited_for = 2 * counts.norm_sequence  # forward and backward
    return Step(
        compute=batch_per_device * counts.operations / (where.peak * utilisation),
        gradients=latency + where.reduce_seconds(counts.gradient_bytes),
        norms=waited_for * latency + where.reduce_seconds(counts.norm_bytes))


def break_even(counts: Counts, where: Slice, utilisation: float, latency: float) -> float:
    """The batch a device below which a step sends for longer than it computes."""
    one = step_of(counts, where, 1, utilisation, latency)
    return (one.gradients + one.norms) / one.compute


def measure_decoding(num_images: int = 1024, batch_size: int = 64) -> dict:
    """Images a second from JPEG files in memory to uint8 [B, 224, 224, 3] by `input_pipeline`, on this machine.

    Smooth noise of 500x375 pixels, of about ImageNet's mean size as files (110 kB).
    """
    rng = np.random.default_rng(0)
    files = []
    for _ in range(64):
        noise = Image.fromarray(rng.integers(0, 256, (375 // 3, 500 // 3, 3), np.uint8)).resize((500, 375))
        file = io.BytesIO()
        noise.save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    images = [files[index % len(files)] for index in range(num_images)]
    split = Split("made up", images, np.ones(num_images, int), np.ones(num_images, int),
                  np.array([f"{index}.jpg" for index in range(num_images)]))
    batches = np.arange(num_images).reshape(-1, batch_size)
    for _ in input_pipeline.decode_batches(split, iter(batches[:2]), 224, 224):
        pass  # which loads TensorFlow
    # From the pipeline's start to its end: it decodes ahead of what is asked for.
    load, start, cpu_start = os.getloadavg()[0], time.perf_counter(), time.process_time()
    decoded = sum(len(batch) for batch in input_pipeline.decode_batches(split, iter(batches), 224, 224))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"images_per_second": decoded / seconds, "images_per_core_second": decoded / cpu_seconds,
            "load_average": load, "cores": len(os.sched_getaffinity(0)),
            "mean_file_bytes": float(np.mean([len(file) for file in files]))}


def _range(values: list[float], form: str) -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def page(counts: Counts, decoding: dict, steps: int, source: dict) -> str:
    """The Markdown page."""
    cases = {where: [(utilisation, latency) for utilisation in UTILISATIONS for latency in where.latency]
             for where in SLICES}

    def pre_training_steps(where: Slice, batch_per_device: float) -> list[Step]:
        return [step_of(counts, where, batch_per_device, *case) for case in cases[where]]

    vendors = [[f"[{where.name}]({where.source})", f"{where.peak / 1e12:g} ({where.peak_of})",
                f"{where.links / 1e9:g}", f"{where.share:g}", _range([1e6 * value for value in where.latency], "g"),
                str(where.processes)] for where in SLICES]
    batches = [[where.name, *(_range([break_even(counts, where, utilisation, latency) for latency in where.latency],
                                     ".0f") for utilisation in UTILISATIONS)] for where in SLICES]
    times, inputs = [], []
    for where in SLICES:
        paper = pre_training_steps(where, GLOBAL_BATCH / where.devices)
        minutes = [steps * step.total / 60 for step in paper]
        busy = [step.compute / step.total for step in paper]
        large = pre_training_steps(where, LARGE_BATCH)
        fewer = [steps * GLOBAL_BATCH / (LARGE_BATCH * where.devices) * step.total / 60 for step in large]
        times.append([where.name, _range(minutes, ".0f"), _range([100 * share for share in busy], ".0f"),
                      str(LARGE_BATCH * where.devices), _range(fewer, ".1f")])
        needed = [GLOBAL_BATCH / where.processes / step.total for step in paper]
        needed_large = [LARGE_BATCH * where.devices / where.processes / step.total for step in large]
        per_core = decoding["images_per_core_second"]
        inputs.append([where.name, _range(needed, ",.0f"), _range([rate / per_core for rate in needed], ",.0f"),
                       _range(needed_large, ",.0f"), _range([rate / per_core for rate in needed_large], ",.0f")])
    return "\n\n".join([
        "# Scaling on paper",
        "Made by `" + source["command"] + "`; nothing on this page but the counts and the decode rate was measured: no "
        "TPU and no node of H100s was at hand.",
        "## What a step computes and sends",
        "Counted from the network of `configs/imagenet.py` (224x224, 1,000 classes, two identity layers); a test holds "
        "the counts to the all-reduces in the lowered program of the step.",
        markdown_table(["", "a step"], [
            ["parameters", f"{counts.parameters:,}"],
            ["gradients all-reduced", f"{counts.gradient_bytes / 1e6:.1f} MB, {counts.gradient_reductions} arrays"],
            ["BN statistics all-reduced, forward and backward",
             f"{counts.norm_bytes / 1e6:.3f} MB, {counts.norm_reductions} arrays of {counts.norm_layers} layers"],
            ["of these, one after another", f"2 x {counts.norm_sequence}: towers and shortcuts run side by side"],
            ["multiply-adds of an image's forward", f"{counts.multiply_adds:,}"],
            ["operations of an image, forward and backward", f"{counts.operations / 1e9:.2f} GFLOP"]]),
        f"BN statistics are {counts.gradient_bytes / counts.norm_bytes:.0f} times fewer bytes than gradients, but each "
        "waits for the one before: what they cost is latency.",
        "## What is assumed",
        markdown_table(["", "peak, TFLOP/s a device", "links, GB/s a device, both directions", "share in use",
                        "latency of a small all-reduce, us (assumed)", "processes that feed it"], vendors),
        f"- Utilisation of the peak while computing: {', '.join(f'{100 * value:g}' for value in UTILISATIONS)} per "
        "cent. Convolutions of 16 to 512 channels fill a 128- or 256-wide matrix unit badly; where in this range it is "
        "has not been measured. Every range below is over these and over the two latencies. Convolutions are in "
        "bfloat16 (train.dtype=auto), gradients in float32.\n"
        "- The share of the links: on a TPU one direction along one axis of the 4x4 torus; on NVLink one direction.\n"
        "- The latencies are our guess at what a step waits for, collectives' start included; no vendor prints them.\n"
        "- XLA joins the gradients into few all-reduces, and those of layers side by side into one. Nothing overlaps: "
        "gradients could, beside the backward pass, BN's cannot.\n"
        "- Starting a kernel (some hundreds a step, microseconds each) and handing a step to the devices are left out. "
        "At two to four images a device they weigh as much as the rest or more: the times below are lower bounds.\n"
        "- Backward is twice forward. Input never waits (but see below).",
        "## Where a slice stops scaling",
        "The batch a device below which a step sends for longer than it computes, by utilisation:",
        markdown_table(["", *(f"{100 * value:g} per cent" for value in UTILISATIONS)], batches),
        f"The paper's batch of {GLOBAL_BATCH} is {GLOBAL_BATCH / 16:g} images a chip on 16 and {GLOBAL_BATCH / 8:g} on "
        "8 GPUs: below or about these bounds, so that few devices are nearly as good as many.",
        "## ImageNet pre-training",
        f"{steps:,} steps of {GLOBAL_BATCH} ({steps * GLOBAL_BATCH / 1e6:.1f} million images), evaluation and "
        f"checkpoints left out; and as many images in batches of {LARGE_BATCH} a device, which is another recipe (the "
        "paper has none for it):",
        markdown_table(["", f"minutes, batch {GLOBAL_BATCH}", "per cent of it computing", "the larger batch",
                        "minutes"], times),
        "## Input",
        f"Measured here: {decoding['images_per_core_second']:,.0f} images a second of one core's time, JPEG of "
        f"{decoding['mean_file_bytes'] / 1e3:.0f} kB and 500x375 pixels to 224x224 by tf.data (on {decoding['cores']} "
        f"cores of a virtual machine at a load average of {decoding['load_average']:.1f}; by the clock "
        f"{decoding['images_per_second']:,.0f} images/s). Decoding the images of a whole pre-training takes "
        f"{steps * GLOBAL_BATCH / decoding['images_per_core_second'] / 3600:,.0f} core-hours. What a process would "
        "have to decode so that its devices never wait, and how many such cores that takes:",
        markdown_table(["", f"images/s, batch {GLOBAL_BATCH}", "cores", f"images/s, {LARGE_BATCH} a device", "cores"],
                       inputs),
        "A process with fewer cores than that is what sets the time of pre-training, not its devices. The four "
        "benchmarks need none of this: they lie decoded in the devices' memory.",
        f"Commit {(source['commit'] or 'unknown')[:7]}, jax {source['versions']['jax']}."]) + "\n"


def main() -> None:
    parser = Parser("experiments.scaling", __doc__)
    parser.add_argument("--json", type=Path, help="where to write the counts and the decode rate")
    parser.add_argument("--output", type=Path, help="where to write the page")
    args = parser.parse_args()
    config = imagenet.get_config()
    counts, decoding, source = count(config, NUM_CLASSES), measure_decoding(), provenance.collect()
    text = page(counts, decoding, config.train.steps, source)
    print(text)
    if args.json:
        args.json.write_text(json.dumps({"counts": dataclasses.asdict(counts), "decoding": decoding,
                                         "provenance": source}, indent=1) + "\n")
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
