"""Tables of cases that take too long for `make test`: every second case there, all of them in `make test-all`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], every: int = 2) -> list[Any]:
    """Cases of `parametrize`, all but each `every`-th marked slow; marks and names that they have stay."""
    found = []
    for number, case in enumerate(cases):
        marks = () if number % every == 0 else (pytest.mark.slow,)
        if hasattr(case, "values") and hasattr(case, "marks"):  # a pytest.param
            found.append(pytest.param(*case.values, id=case.id, marks=(*case.marks, *marks)))
        else:
            found.append(pytest.param(*(case if type(case) is tuple else (case,)), marks=marks))
    return found
