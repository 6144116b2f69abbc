"""Every public name has a docstring that tells how to use it.

A public name is one in `rankwise.__all__`. Its public methods count, too. Examples are run by pytest's
``--doctest-modules``; the tests here see that there is one.
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import enum
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

import pytest

import rankwise

# Classes whose parameters are not described, and why.
WITHOUT_PARAMETERS = {
    "AdaptiveRanks": "`adapt_ranks` makes it, and describes the parameters",
    "SpedUp": "`speed_up` makes it, and describes the parameters",
    "AutoPeftModel": "its constructor accepts all arguments, and always raises an error",
}
# Subclasses of `AutoPeftModel` that only fix Transformers' class of the base model. `AutoPeftModel` has the example.
VARIANT_OF_AUTO = re.compile(r"AutoPeftModelFor\w+$")
# Methods that Transformers' trainers call, with the parameters of Transformers' `TrainerCallback`.
CALLED_BY_TRAINERS = re.compile(r"AdaptRanks\.(on_\w+|state)$")

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Warns|Yields|Example|Examples):$")
RANGE_OR_UNIT = re.compile(
    r"at least|at most|greater than|less than|\bin [\[(]|\bfrom \d|\d to |number of|sum of|steps?\b|bytes|\bseed"
)
SHAPE = re.compile(r"\(.*\)|\d-D|\d-dim|shape")


def public_names() -> list[str]:
    return sorted(rankwise.__all__)


def public_methods() -> list[str]:
    found = []
    for name in public_names():
        cls = getattr(rankwise, name)
        if inspect.isclass(cls) and not issubclass(cls, enum.Enum):
            for method in sorted({each for owner in own_classes(cls) for each in vars(owner)}):
                if not method.startswith("_") and is_method(inspect.getattr_static(cls, method)):
                    found.append(f"{name}.{method}")
    return found


def own_classes(cls: type) -> Iterator[type]:
    return (each for each in cls.__mro__ if each.__module__.startswith("rankwise"))


def is_method(member: Any) -> bool:
    return isinstance(member, (classmethod, staticmethod, property)) or inspect.isfunction(member)


def sections(doc: str) -> dict[str, str]:
    """The text before the first section, as "", and the text of each section by its name."""
    found, current = {"": ""}, ""
    for line in doc.splitlines():
        match = SECTION.match(line)
        if match:
            current = match[1]
            found[current] = ""
        elif current and line and not line.startswith(" "):
            current = ""
            found[current] += f"{line}\n"
        else:
            found[current] += f"{line}\n"
    return found


def entries(section: str) -> dict[str, str]:
    """``name: description`` of a section; lines that are indented further belong to the entry before them."""
    found: dict[str, str] = {}
    last = ""
    for line in textwrap.dedent(section).splitlines():
        match = re.match(r"([\w.]+): (.*)", line)
        if match:
            last = match[1]
            found[last] = match[2]
        elif last:
            found[last] += f" {line.strip()}"
    return found


def parameters_of(thing: Any) -> dict[str, inspect.Parameter]:
    # The signature of a configuration's class is that of its metaclass.
    own = inspect.signature(thing.__init__ if dataclasses.is_dataclass(thing) else thing).parameters
    return {name: each for name, each in own.items() if name not in ("self", "cls")}


def inherited_fields(thing: Any) -> set[str]:
    """Fields of a dataclass that only its base class declares, and describes."""
    base = thing.__base__ if dataclasses.is_dataclass(thing) else None
    if base is None or not dataclasses.is_dataclass(base):
        return set()
    return {each.name for each in dataclasses.fields(base)} - set(vars(thing)["__annotations__"])


def raised_by(thing: Any) -> set[str]:
    """Names of the exceptions that the code of ``thing`` itself raises."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except OSError:
        return set()
    calls = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise))
    return {each.func.id for each in calls if isinstance(each, ast.Call) and isinstance(each.func, ast.Name)}


def check_summary(doc: str) -> None:
    summary = doc.splitlines()[0]
    assert summary.endswith("."), f"The summary is not a sentence: {summary!r}"
    assert len(summary.split()) >= 3, f"The summary says too little: {summary!r}"


def check_parameters(
    doc: str, parameters: dict[str, inspect.Parameter], inherited: Collection[str] = ()
) -> None:
    described = entries(sections(doc).get("Args", ""))
    assert set(described) | set(inherited) == set(parameters), (
        f"Args describes {sorted(described)}, but the parameters are {sorted(parameters)}"
    )
    for name, text in described.items():
        kind = str(parameters[name].annotation)
        assert len(text.split()) >= 3, f"`{name}`: {text!r} says too little"
        if re.fullmatch(r"(Sequence\[)?(torch\.)?Tensor\]?( \| None)?", kind):
            assert SHAPE.search(text), f"`{name}` is a tensor: give its shape"
        if re.search(r"\b(int|float)\b", kind) and "[" not in kind:
            assert RANGE_OR_UNIT.search(text), f"`{name}` is a number: give its range or its unit"


def check_raises(doc: str, raised: set[str]) -> None:
    told = entries(sections(doc).get("Raises", ""))
    assert raised <= set(told), f"It raises {sorted(raised)}, but Raises names {sorted(told)}"
    for name, text in told.items():
        assert len(text.split()) >= 2, f"{name}: {text!r} says too little"


@pytest.mark.parametrize("name", public_names())
def test_a_public_name_says_what_it_does_and_shows_how(name: str) -> None:
    thing = getattr(rankwise, name)
    doc = inspect.cleandoc(thing.__doc__ or "")
    check_summary(doc)
    if not VARIANT_OF_AUTO.match(name):
        assert doctest.DocTestParser().get_examples(doc), "There is no example"
    if inspect.isclass(thing) and issubclass(thing, enum.Enum):
        return
    if inspect.isfunction(thing):
        assert "Returns" in sections(doc) or inspect.signature(thing).return_annotation == "None", (
            "Returns is missing"
        )
        check_raises(doc, raised_by(thing))
    else:
        own = [vars(thing).get(each) for each in ("__init__", "__post_init__")]
        check_raises(doc, {each for method in own if method is not None for each in raised_by(method)})
    if name not in WITHOUT_PARAMETERS and not VARIANT_OF_AUTO.match(name):
        check_parameters(doc, parameters_of(thing), inherited_fields(thing))


@pytest.mark.parametrize("name", [each for each in public_methods() if not CALLED_BY_TRAINERS.match(each)])
def test_a_public_method_says_what_it_does(name: str) -> None:
    cls, _, method = name.partition(".")
    member = inspect.getattr_static(getattr(rankwise, cls), method)
    doc = inspect.getdoc(getattr(getattr(rankwise, cls), method)) or ""
    check_summary(doc)
    if isinstance(member, property):
        return
    function = getattr(member, "__func__", member)
    check_parameters(doc, parameters_of(function))
    check_raises(doc, raised_by(function))


def test_a_docstring_without_a_parameter_a_shape_a_range_or_an_error_is_noticed() -> None:
    def scaled(x: Tensor, factor: float) -> Tensor:  # type: ignore[name-defined]  # noqa: F821
        if factor <= 0:
            raise ValueError("`factor` must be greater than 0.")
        return x * factor

    given = parameters_of(scaled)
    good = inspect.cleandoc(
        """Multiply a tensor by a factor.

        Args:
            x: any float tensor, (rows, columns).
            factor: multiplier of every element, greater than 0.

        Raises:
            ValueError: ``factor`` is 0 or less.
        """
    )
    check_parameters(good, given)
    check_raises(good, raised_by(scaled))
    for before, after, complaint in (
        ("    x: any float tensor, (rows, columns).\n", "", "Args describes"),
        (", (rows, columns)", "", "give its shape"),
        (", greater than 0", "", "range or its unit"),
        ("multiplier of every element, greater than 0.", "factor.", "too little"),
    ):
        with pytest.raises(AssertionError, match=complaint):
            check_parameters(good.replace(before, after), given)
    with pytest.raises(AssertionError, match="Raises names"):
        check_raises(good.partition("Raises:")[0], raised_by(scaled))
