"""Rules: which setting the linears of some paths get. The first rule that matches a path wins."""

import re
from collections.abc import Collection, Iterable
from typing import Any, Protocol, runtime_checkable

from jquant.errors import RecipeError


@runtime_checkable
class HasMatch(Protocol):
    """A rule: a regular expression for whole paths beside whatever it sets."""

    @property
    def match(self) -> str:
        """The regular expression."""


def check_pattern(match: str) -> None:
    """Refuses a pattern that is not a regular expression.

    Raises:
      RecipeError: it is none.
    """
    try:
        re.compile(match)
    except re.error as error:
        raise RecipeError(f"match {match!r} is not a regular expression: {error}") from error


def first_match[T: HasMatch](rules: Iterable[T], path: str) -> T | None:
    """Returns the first rule that matches a path, None if none does."""
    return next((rule for rule in rules if re.fullmatch(rule.match, path)), None)


def refuse_unused(rules: Iterable[HasMatch], used: Collection[Any], path: str) -> None:
    """Refuses rules that no linear falls to.

    Args:
      rules: all rules.
      used: those that some linear falls to.
      path: a linear's path, for the message.

    Raises:
      RecipeError: a rule is not among the used.
    """
    for rule in rules:
        if rule not in used:
            raise RecipeError(
                f"rule {rule.match!r} is unused: no path such as {path!r} falls to it "
                "(rules before it may match first); correct the pattern, move the rule up, or remove it"
            )
