"""The error of training data: which file or dataset, what was found there, and the rule it breaks."""

from __future__ import annotations

from megatron_ext.config.errors import UserError


class DataError(UserError):
    """Training data that cannot be used.

    Args:
        subject: the path of the file, or the name of the dataset.
        found: what was found, with its numbers, as a clause without a full stop.
        rule: the rule it breaks, or what to do about it.
    """

    def __init__(self, subject: object, found: str, rule: str):
        # The three arguments stay in `args`, so that the error survives pickling between processes.
        super().__init__(subject, found, rule)
        self.subject, self.found, self.rule = subject, found, rule

    def __str__(self) -> str:
        return f"{self.subject}: {self.found}; {self.rule}"
