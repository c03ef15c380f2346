"""The one family of errors that a user can cause.

Every message names what was given (the JSON key, the argument, the file), its value, and the rule it breaks, so that
the reader can mend it without opening our source. Whatever else goes wrong is a bug of ours and stays an `assert`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
        value: what was given; shown with `repr`.
        rule: the rule it breaks, as a sentence without a full stop.
        hint: what to do instead, if that is known.
    """

    def __init__(self, key: str, value: Any, rule: str, hint: str | None = None):
        self.key, self.value, self.rule, self.hint = key, value, rule, hint
        message = f"{key} = {value!r}: {rule}"
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
        subject = "" if tensor is None else f"tensor {tensor} "
        super().__init__("; ".join([f"checkpoint {path}: {subject}{found}", *filter(None, (rule, hint))]))
