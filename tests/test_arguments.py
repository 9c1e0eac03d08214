import pytest

from jlml_jax import compare, search, unpack
from jlml_jax.arguments import Parser


@pytest.mark.parametrize("command, arguments, told", [
    (unpack, [], "error: the following arguments are required: --workdir; see --help\n"),
    (search, ["--workdir=run", "--gallery=crops", "--top_k=ten"],
     "error: argument --top_k: invalid int value: 'ten'; see --help\n"),
    (compare, ["--workdir=run", "a.jpg"], "error: the following arguments are required: IMAGE; see --help\n"),
    (unpack, ["--workdir=run", "--fil=x.zip"], "error: unrecognized arguments: --fil=x.zip; see --help\n"),
    (search, ["--workdir=run", "--gallery=a", "--gallery", "b", "--query=a.jpg"],
     "error: --gallery is given 2 times, and takes one value; see --help\n"),
    (unpack, ["--workdir=run", "two\nlines"], "error: unrecognized arguments: two lines; see --help\n"),
])
def test_what_is_wrong_is_told_in_one_line(command, arguments, told, capsys):
    with pytest.raises(SystemExit) as raised:
        command.main(arguments)
    assert raised.value.code == 2
    assert capsys.readouterr() == ("", told)


def test_help_has_the_texts_as_they_are_written(capsys):
    with pytest.raises(SystemExit) as raised:
        Parser("jlml_jax.this", "What it does.", "an example:\n  python -m jlml_jax.this\n").parse_args(["--help"])
    assert raised.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m jlml_jax.this [-h]\n\nWhat it does.\n")
    assert out.endswith("\n\nan example:\n  python -m jlml_jax.this\n")
