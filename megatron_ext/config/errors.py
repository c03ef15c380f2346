"""The one family of errors that a user can cause.

Every message names what was given (the JSON key, the argument, the file), its value, and the rule it breaks, so that
the reader can mend it without opening our source. Whatever else goes wrong is a bug of ours and stays an `assert`.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any


class _Short(reprlib.Repr):
    """`repr`, cut before it is made: a value from a stranger's file may be deep, long, or an integer of many digits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxdict = 3, 120, 120, 6

    def repr_int(self, value: int, level: int) -> str:
        return f"an integer of {value.bit_length()} bits" if value.bit_length() > 128 else str(value)


def shown(value: Any) -> str:
    """A value as messages show it: `repr` in one line, at most 200 characters of it, whatever it is."""
    text = one_line(_Short().repr(value))
    return text if len(text) <= 200 else f"{text[:197]}..."


def one_line(text: str) -> str:
    """Text with whatever is not printable (line ends, terminal escapes) escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(ValueError):
    """Base of every error that bad input causes; parts of the package derive their own from it.

    Attributes:
        agreed: all ranks raise it (parallel/agreement.py).
        rank: then, the first rank that found it, unless all did.
    """

    agreed = False
    rank: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled as a call of their class with `args`, which ours do not fit.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[UserError], args: tuple[Any, ...], attributes: dict[str, Any]) -> UserError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class ConfigError(UserError):
    """A setting that cannot work.

    Args:
        key: dotted path of the JSON key, or the name of the argument.
        value: what was given; see `shown`.
        rule: the rule it breaks, as a sentence without a full stop.
        hint: what to do instead, if that is known.
    """

    def __init__(self, key: str, value: Any, rule: str, hint: str | None = None):
        self.key, self.value, self.rule, self.hint = key, value, rule, hint
        message = one_line(f"{key} = {shown(value)}: {rule}")
        super().__init__(message if hint is None else f"{message}; {hint}")


class CheckpointError(UserError):
    """A checkpoint, ours or Hugging Face's, that cannot be read or written, or is not of this model.

    Args:
        path: the file or folder.
        found: what is wrong with it, or with the tensor, as a clause without a full stop.
        rule: the rule it breaks, where that does not go without saying.
        hint: what to do about it, if that is known.
        tensor: the tensor concerned, if it is one.
    """

    def __init__(
        self,
        path: Path | str,
        found: str,
        rule: str | None = None,
        hint: str | None = None,
        *,
        tensor: str | None = None,
    ):
        self.path, self.found, self.rule, self.hint, self.tensor = path, found, rule, hint, tensor
        subject = "" if tensor is None else f"tensor {tensor[:300]} "
        where = f"{path}:" if str(path).startswith("--") else f"checkpoint {path}:"  # an option is no checkpoint
        parts = [f"{where} {subject}{found[:700]}", *filter(None, (rule, hint))]
        super().__init__(one_line("; ".join(parts)))
