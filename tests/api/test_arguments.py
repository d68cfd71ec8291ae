"""Arguments of a Python program that are refused, or taken as what they mean, before a model is read."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest

import jaxdistill
from jaxdistill.api import arguments
from jaxdistill.errors import UserError


def test_what_is_meant_is_taken():
    assert arguments.name_of("model", Path("runs/a")) == "runs/a"
    assert arguments.texts_of("texts", "one") == ["one"]
    assert arguments.texts_of("texts", iter(("one", "two"))) == ["one", "two"]
    assert arguments.whole("top_k", np.int64(3)) == 3
    assert arguments.number("temperature", np.float32(0.5)) == 0.5 and arguments.number("temperature", 1) == 1.0


@pytest.mark.parametrize(
    ("check", "given", "message"),
    [
        (arguments.name_of, None, "model is None; give a name or a path"),
        (arguments.name_of, ["long"] * 40, "model is of type list; give a name or a path"),
        (arguments.texts_of, 3, "model is 3; give a text, or a list of texts"),
        (arguments.texts_of, {"one": 1}, "model is {'one': 1}; give a text, or a list of texts"),
        (arguments.texts_of, ["one", 3], "model holds 3, which is no text"),
        (arguments.whole, "3", "model is '3'; it must be a whole number"),
        (arguments.whole, 1.0, "model is 1.0; it must be a whole number"),
        (arguments.whole, True, "model is True; it must be a whole number"),
        (arguments.whole, np.array(1.5), "model is array(1.5); it must be a whole number"),
        (arguments.number, np.ones(2), "model is array([1., 1.]); it must be a number"),
        (arguments.at_least_one, 0, "model is 0; it must be at least 1"),
        (arguments.number, "1", "model is '1'; it must be a number"),
        (arguments.number, False, "model is False; it must be a number"),
        (arguments.check_flag, "no", "model is 'no'; it must be True or False"),
        (arguments.check_flag, 1, "model is 1; it must be True or False"),
        (arguments.check_function, 3, "model is 3; give a function"),
    ],
)
def test_what_is_of_another_type_is_refused(check, given, message):
    """By the functions that take any value: under tests, annotations are checked before the public ones are called."""
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check("model", given)


def test_a_function_must_take_the_values_that_it_is_called_with():
    def with_more(step, figures, more=None):
        return more

    for function in (with_more, print, functools.partial(with_more, more=3), lambda *values: values):
        arguments.check_function("on_step", function, "the step", "its figures")
    for function in (lambda step: step, lambda step, figures, more: more, functools.partial(with_more, 1, 2)):
        with pytest.raises(UserError, match=r"on_step cannot be called with 2 value\(s\), the step and its figures"):
            arguments.check_function("on_step", function, "the step", "its figures")


def test_functions_are_tried_before_a_run_begins(tmp_path):
    for wrong, message in (
        ({"on_step": lambda step: step}, "on_step cannot be called with 2"),
        ({"on_evaluation": lambda: None}, "on_evaluation cannot be called with 2"),
        ({"on_checkpoint": lambda step: step}, "on_checkpoint cannot be called with 2"),
        ({"losses": {"mine": (lambda student, teacher: student, 1.0)}}, r"losses\['mine'\] cannot be called with 1"),
    ):
        with pytest.raises(UserError, match=message):
            jaxdistill.distil(workdir=tmp_path / "run", config="quickstart:smoke", **wrong)
    assert not (tmp_path / "run").exists()
