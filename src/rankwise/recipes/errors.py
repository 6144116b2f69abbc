"""Mistakes that the user can correct. One message shows all problems, each with its place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rankwise.config.suggest import nearest


@dataclass(frozen=True)
class Problem:
    """One mistake to correct.

    Args:
        where: the place of the problem: a recipe's dotted key, a file, or a file and a line.
        message: what is wrong.

    Example:
        >>> print(Problem("training.max_steps", "must be at least 1, but is 0."))
        training.max_steps: must be at least 1, but is 0.
    """

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class RecipeError(ValueError):
    """A recipe, its data or its output folder can't be used as it is.

    Args:
        problems: all problems, or one message.
        source: the file that has the problems. None: no single file has them.

    Example:
        >>> print(RecipeError([Problem("model", "is missing"), Problem("output", "is missing")], "bbc.yaml"))
        bbc.yaml has 2 problems:
          model: is missing
          output: is missing
    """

    def __init__(self, problems: Sequence[Problem] | str, source: str | None = None) -> None:
        self.problems = [Problem("", problems)] if isinstance(problems, str) else list(problems)
        self.source = source
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [str(problem) for problem in self.problems]
        if len(lines) == 1:
            return f"{self.source}: {lines[0]}" if self.source else lines[0]
        head = f"{self.source} has" if self.source else "There are"
        return "\n".join([f"{head} {len(lines)} problems:", *(f"  {line}" for line in lines)])


def refusal(where: str, message: str, source: str | None = None) -> RecipeError:
    """Return the error to raise for a single problem. The arguments are those of `Problem` and `RecipeError`."""
    return RecipeError([Problem(where, message)], source)


def raise_problems(problems: Iterable[Problem], source: str | None = None) -> None:
    """Raise `RecipeError` if there is any problem."""
    gathered = list(problems)
    if gathered:
        raise RecipeError(gathered, source)


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """The end of a message: the nearest valid name or, if no name is near, the first twenty valid names.

    Example:
        >>> did_you_mean("txt", ["text", "rating"])
        "Did you mean 'text'?"
        >>> did_you_mean("colour", ["text", "rating"])
        'Valid: text, rating.'
    """
    names = list(valid)
    found = nearest(word, names, or_part=True)
    if found is not None:
        return f"Did you mean {found!r}?"
    shown = ", ".join(names[:20])
    return f"Valid: {shown}{', …' if len(names) > 20 else '.'}" if names else ""
