"""Inputs that nobody means well: what reads them takes them or refuses them by a UserError, and nothing else.

The same targets at their full length: python -m experiments.faults.inputs.
"""

import contextlib
import json
import random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_program

from experiments.faults import inputs
from jlml_jax.datasets import folder, grid, listing, market1501, viper
from jlml_jax.errors import UserError

settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=200)
settings.load_profile("fixed")


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    made = {}

    def target(name):
        if name not in made:
            made[name] = inputs.TARGETS[name](tmp_path_factory.mktemp(name))
        return made[name]
    return target


@pytest.mark.parametrize(("name", "count"), [
    ("names", 300), ("csv", 300), ("overrides", 100), ("images", 80), ("gallery", 60), ("npz", 150), ("parquet", 100),
    ("run", 60)])
def test_mutated_inputs_are_taken_or_refused(targets, name, count):
    target, outcomes = targets(name), {"taken": 0, "refused": 0}
    for data in [*target.seeds, *(inputs.mutate(random.Random(number), target) for number in range(count))]:
        try:
            target.read(data)
            outcomes["taken"] += 1
        except UserError as error:
            assert str(error).strip()
            outcomes["refused"] += 1
    assert outcomes["refused"] > count / 10 or name == "names"  # which refuses inside


def crops_of(builder, name):
    inputs._Listing.file = name
    with mock.patch.object(grid, "_read_partitions", lambda *_: []):
        originals = builder.inspect(inputs._Listing("/data"))
    return [(crop.identity, crop.camera) for crops in originals.splits.values() for crop in crops]


@given(st.integers(-1, 9999), st.integers(1, 6), st.integers(0, 9), st.integers(0, 999_999), st.integers(0, 99),
       st.sampled_from([".jpg", ".jpg.jpg"]))
def test_names_of_market_1501_say_who_and_where(identity, camera, sequence, frame, box, suffix):
    person = "-1" if identity < 0 else f"{identity:04d}"
    name = f"{person}_c{camera}s{sequence}_{frame:06d}_{box:02d}{suffix}"
    assert crops_of(market1501.Market1501, name) == [(identity, camera)] * 4
    match = listing.NAME.fullmatch(name)
    number = {"distractor": 0, "junk": -1}.get(listing.identity_of(match), listing.identity_of(match))
    assert (int(number), int(match["camera"])) == (identity, camera)


@given(st.integers(0, 9999), st.integers(1, 8), st.lists(st.integers(0, 10**6), min_size=5, max_size=5))
def test_names_of_grid_say_who_and_where(identity, camera, rest):
    name = f"{identity:04d}_{camera}_{'_'.join(map(str, rest))}.jpeg"
    assert crops_of(grid.Grid, name) == [(identity, camera)] * 2


@given(st.integers(0, 999), st.integers(0, 359))
def test_names_of_viper_say_who(prefix, angle):
    assert crops_of(viper.Viper, f"{prefix:03d}_{angle}.bmp") == [(prefix + 1, 1), (prefix + 1, 2)]


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=()), min_size=1, max_size=60),
       st.sampled_from(["", ".jpg", ".jpeg", ".bmp", ".PNG", "_c1.png"]))
def test_any_name_is_an_image_a_stray_or_refused(name, suffix):
    for builder in (market1501.Market1501, viper.Viper, grid.Grid, folder.Folder):
        with contextlib.suppress(UserError):
            assert all(identity >= -1 for identity, _ in crops_of(builder, name + suffix))


CELLS = st.one_of(st.sampled_from(["a.png", "b.png", "sub/c d.png", "train", "query", "0", "1", "-1", "junk", "nan"]),
                  st.text(max_size=20), st.floats().map(str))


@settings(max_examples=100)
@given(st.permutations(["image", "identity", "camera", "split", "x", "y", "width", "height"]), st.integers(1, 8),
       st.lists(st.lists(CELLS, min_size=8, max_size=8), max_size=5), st.booleans())
def test_csv_of_any_cells(targets, columns, number, rows, quote):
    def cell(text):
        return '"' + text.replace('"', '""') + '"' if quote else text

    lines = [",".join(map(cell, row[:number])) for row in [columns, *rows]]
    with contextlib.suppress(UserError):
        targets("csv").read("\n".join(lines).encode("utf-8", "surrogatepass"))


@settings(max_examples=100)
@given(st.data())
def test_overrides_of_any_value(targets, data):
    field = data.draw(st.sampled_from(targets("overrides").seeds)).split(b"=")[0]
    value = data.draw(st.one_of(st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace")),
                                st.sampled_from(targets("overrides").tokens)))
    with contextlib.suppress(UserError):
        targets("overrides").read(field + b"=" + value)


CAMPAIGN = """
import json, os, signal, sys
from pathlib import Path
from experiments.faults import inputs

def read(data):
    if data == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    if data == b"raise":
        raise KeyError("it")
    raise inputs.UserError("no")

inputs.TARGETS["bad"] = lambda folder: inputs.Target(read, [b"x"])
for name, choices, count in (("kept", [b"a", b"raise"], 40), ("died", [b"die"], 1)):
    inputs.mutate = lambda rng, target: rng.choice(choices)
    print(json.dumps(inputs.campaign("bad", count, 0, Path(sys.argv[1], name))), file=sys.stderr)
"""


def test_a_target_that_fails_is_told_and_its_input_kept(tmp_path):
    done = run_program(CAMPAIGN, tmp_path)
    assert done.returncode == 0, done.stderr
    kept, died = map(json.loads, done.stderr.splitlines())
    assert kept["inputs"] == 40 == kept["refused"] + kept["failed"] and kept["failed"] > 5
    assert [reason.startswith("KeyError: 'it'") for reason in kept["reasons"]] == [True]
    assert died["failed"] == 1 and list(died["reasons"]) == ["died: SIGKILL "]
    for name, data in (("kept", b"raise"), ("died", b"die")):
        assert [path.read_bytes() for path in (tmp_path / name).iterdir()] == [data]
