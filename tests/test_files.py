"""Files written whole, and locks."""

import fcntl
import io
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jlml_jax import files
from jlml_jax.checkpoints import claim_workdir
from jlml_jax.errors import UserError
from jlml_jax.files import cached_realpath, check_output, lock, write_atomically, write_output
from jlml_jax.gallery import Gallery


def contents(folder):
    return [(path.name, path.read_text()) for path in folder.iterdir()]


def test_what_is_written_is_the_text_the_bytes_or_what_a_function_writes(tmp_path):
    for content in ("é", "é".encode(), lambda file: file.write("é".encode())):
        write_atomically(tmp_path / "results.json", content)
        assert contents(tmp_path) == [("results.json", "é")]


def fail(file):
    file.write(b"new")
    raise KeyboardInterrupt


@pytest.mark.parametrize(("content", "error"), [("x" * 2000, OSError), (fail, KeyboardInterrupt)])
def test_half_a_file_is_never_written(tmp_path, small_files, content, error):
    write_atomically(tmp_path / "results.json", "old")
    with pytest.raises(error):
        write_atomically(tmp_path / "results.json", content)
    assert contents(tmp_path) == [("results.json", "old")]


def test_an_output_that_cannot_be_written_is_told(tmp_path, small_files):
    with pytest.raises(UserError, match=f"--output={tmp_path} is a folder; give a file"):
        check_output(tmp_path)
    with pytest.raises(UserError, match=f"x cannot be written: {tmp_path / 'nowhere'} is not a folder that can be"):
        check_output(tmp_path / "nowhere" / "x")
    check_output(tmp_path / "x")
    write_output(tmp_path / "x", "old")
    with pytest.raises(UserError, match=r"cannot write --output=.*x \(File too large\), what was there is as it was"):
        write_output(tmp_path / "x", "x" * 2000)
    assert contents(tmp_path) == [("x", "old")]


def test_a_lock_says_who_has_it_until_it_is_closed(tmp_path):
    held = lock(tmp_path / "lock", "the folder", "wait")
    with pytest.raises(UserError, match=rf"the folder is in use by process {os.getpid()} on .*, since .*; try another"):
        lock(tmp_path / "lock", "the folder", "try another")
    held.close()
    lock(tmp_path / "lock", "the folder", "wait").close()


def test_a_lock_is_waited_for_and_that_is_told_after_a_moment(tmp_path, monkeypatch):
    told = io.StringIO()  # capsys would lose what is printed while it is read
    monkeypatch.setattr(sys, "stdout", told)
    monkeypatch.setattr(files, "_PATIENCE", 0.1)
    with ThreadPoolExecutor(1) as pool:
        held = lock(tmp_path / "lock", "the folder", None)
        waiting = pool.submit(lock, tmp_path / "lock", "the folder", None)
        end = time.monotonic() + 30
        while not told.getvalue().endswith("\n") and time.monotonic() < end:
            time.sleep(0.01)
        assert not waiting.done()
        held.close()
        waiting.result(10).close()
    said = told.getvalue()
    assert said.startswith(f"the folder is in use by process {os.getpid()} on ") and said.endswith("; waiting for it\n")

    monkeypatch.setattr(files, "_PATIENCE", 60)
    with ThreadPoolExecutor(1) as pool:
        held = lock(tmp_path / "lock", "the folder", None)
        waiting = pool.submit(lock, tmp_path / "lock", "the folder", None)
        time.sleep(0.1)
        assert not waiting.done()
        held.close()
        waiting.result(10).close()
    assert told.getvalue() == said


@pytest.mark.parametrize("use", [
    lambda folder, config: claim_workdir(folder, config, {"dataset": "market1501"}).close(),
    lambda folder, config: Gallery.create(folder, "f" * 16, 4).close(),
])
def test_a_file_system_without_locks_is_told(tiny_config, tmp_path, monkeypatch, capsys, use):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    use(tmp_path, tiny_config)
    assert "without locks (Function not implemented)" in capsys.readouterr().out


def test_real_paths_by_their_folders(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/1", "a/b/2", "3"):
        (tmp_path / name).touch()
    for link, target in (("a/to_3", "../3"), ("a/to_to_3", "to_3"), ("to_b", "a/b"), ("a/b/up", ".."), ("loop", "loop"),
                         ("a/gone", "nowhere/x"), ("absolute", tmp_path / "a" / "1"), ("there", "back"),
                         ("back", "there")):
        (tmp_path / link).symlink_to(target)
    monkeypatch.chdir(tmp_path / "a")
    realpath = cached_realpath()
    for folder in (".", "", "..", "b", "b/..", "../to_b", "../to_b/..", "b/up", "b/up/b", "../loop", "nowhere",
                   "../nowhere/../a", str(tmp_path), "/"):
        for name in ("1", "2", "3", "to_3", "to_to_3", "to_b", "up", "loop", "gone", "absolute", "there", "..", ".", "",
                     "b"):
            path = os.path.join(folder, name)
            for each in (path, Path(path), path):
                assert realpath(each) == os.path.realpath(each), path
