import importlib
import sys

import numpy as np
import pytest

from experiments.bench import __main__ as command
from experiments.bench.timing import ratio_of


def test_ratios_are_of_pairs():
    assert ratio_of([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == {"median": 2.0, "minimum": 1.0, "maximum": 3.0}


@pytest.mark.parametrize("benchmark", ["train", "forward", "input"])
def test_without_pytorch_it_says_how_to_install_it(monkeypatch, capsys, benchmark):
    monkeypatch.setitem(sys.modules, "torch", None)
    for module in ("torch_peer", "train_step", "forward", "input_rate"):
        monkeypatch.delitem(sys.modules, f"experiments.bench.{module}", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench", benchmark])
    assert command.exit_status(command._command) == 2
    assert "pip install -e '.[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", ["train", "forward"])
def test_both_do_the_same_work(benchmark):
    """Checked by the benchmarks themselves, before they time anything."""
    pytest.importorskip("torch", reason="needs pip install -e '.[bench]'")
    module, function = command.BENCHMARKS[benchmark][0].split(".")
    measure = getattr(importlib.import_module(f"experiments.bench.{module}"), function)
    result = measure(height=64, width=32, batch_size=4, dtype="float32", repeats=1)
    assert result["over_torch"]["median"] > 0
    assert np.isfinite(list(result["images_per_second"].values())).all()
