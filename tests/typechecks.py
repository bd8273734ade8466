"""What checks annotated shapes under pytest: beartype, of functions that are defined once."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def outermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """`beartype`, but for functions within functions: theirs would be compiled anew in every call, for longer than it.

    (Half the time of tests of small models went there.)
    """
    return function if "<locals>" in function.__qualname__ else beartype(function)
