"""Where a result comes from."""

import subprocess

from jlml_jax import provenance


def test_the_commit_is_that_of_the_checkout_that_has_the_package(tmp_path, monkeypatch):
    """A package that is installed within another project's checkout is none of its files."""
    def git(*arguments):
        author = "-c", "user.name=a", "-c", "user.email=a@b"
        done = subprocess.run(["git", "-C", tmp_path, *author, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    package = tmp_path / ".venv" / "jlml_jax"
    package.mkdir(parents=True)
    (package / "provenance.py").touch()
    (tmp_path / "own.py").touch()
    git("init", "-q")
    git("add", "own.py")
    git("commit", "-qm", "another project")
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    found = provenance.collect()
    assert found["commit"] is None and found["uncommitted_changes"] is None
    git("add", "-f", ".venv")
    assert provenance.collect()["uncommitted_changes"] is True
    git("commit", "-qm", "the package")
    found = provenance.collect()
    assert found["commit"] == git("rev-parse", "HEAD") and found["uncommitted_changes"] is False
