"""Unknown fields, on the command line and in a config, and what is known near them."""

import pytest

from configs import default
from jlml_jax.config_fields import refuse_unknown_field, refuse_unknown_fields
from jlml_jax.errors import UserError
from jlml_jax.train import train_and_evaluate


@pytest.mark.parametrize(("arguments", "message"), [
    (["--config.optim.learning_rat=1"], "there is no config field optim.learning_rat; near it: optim.learning_rate"),
    (["--config=x.py", "--config.train.steps=3", "-config.trian.steps", "3"], "trian.steps; near it: train.steps, "),
    (["--noconfig.augment.flop"], "augment.flop; near it: augment.flip, "),
    (["--config.train.steps.most=3"], "train.steps.most; near it: train.steps, "),
    (["--config.zzz.zzz=1"], "there is no config field zzz.zzz; configs/default.py has every field"),
    (["--config.\udcff\n=1"], r"there is no config field '\udcff\n'; configs/default.py has every field"),
])
def test_an_unknown_field_is_told_with_those_near_it(arguments, message):
    with pytest.raises(UserError) as error:
        refuse_unknown_field(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_field_of_thousands_of_letters_is_told_shortly():
    with pytest.raises(UserError) as error:
        refuse_unknown_field(["--config." + "x" * 100_000])
    assert len(str(error.value)) < 200


def test_known_fields_and_other_flags_are_not_refused():
    refuse_unknown_field(["--config=configs/viper.py", "--config.train.steps=3", "--config.data.mean[0]=1",
                          "--config.data", "--noconfig.augment.flip", "--workdir=config.x", "config.x"])


def test_a_field_that_a_config_sets_and_none_has_is_refused(tiny_config, tmp_path):
    """As in a config file of the user's own: nothing reads it, and the run would be another than they mean."""
    refuse_unknown_fields(default.get_config())
    tiny_config.optim.weight_decy = 0.1
    with pytest.raises(UserError, match="^there is no config field optim.weight_decy; near it: optim.weight_decay"):
        train_and_evaluate(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
