"""The one family of exceptions whose message is written for the user; every other exception is a bug.

The command line prints a `UserError` without a traceback and leaves the traceback of everything else, so that a bug
never looks like a mistake of the user.
"""

from typing import ClassVar


class UserError(Exception):
    """Something that the user can mend: a full disk, a dead node, a damaged file.

    The message gives the value, the rule, the place and the way out. `exit_code` is that of the command `trimtab`.
    """

    exit_code: ClassVar[int] = 1

    @property
    def is_bug(self) -> bool:
        """Whether the cause is a bug after all, such as an error that another process raised."""
        return False


class InvalidValue(UserError, ValueError):
    """A value that the user gave, in an option, a setting, a file or a call, breaks a rule."""

    exit_code: ClassVar[int] = 2
