"""The text that the command line prints for an exception, and its exit code.

There are three kinds. An error that the user can mend becomes one message, and so does a refusal of the operating
system. Everything else is a bug: it keeps its traceback, and the text says so, so that nobody looks for a mistake of
their own.
"""

import errno
import importlib.metadata
import os
import platform
import shlex
import traceback
from collections.abc import Sequence

from dispatch.errors import UserError

BUG_CODE = 70  # EX_SOFTWARE of sysexits.h; Python's own 1 would look like a run that failed

# pathlib's RuntimeError for ~ if HOME is not set and the system does not know the user, as in a container. Its class
# tells nothing, so it is known by its text.
_NO_HOME = "Could not determine home directory."

# Refusals that the program cannot avoid, with a way out. A missing file (ENOENT) is not among them: if the user named
# it, the code that opens it raises an InvalidValue; if not, it is a bug.
_SYSTEM_REFUSALS = {
    errno.ENOSPC: "free some space there, or choose another disk",
    errno.EDQUOT: "free some of your quota there, or choose another disk",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "mend its symbolic links, or choose another place",
    errno.EIO: "look at the disk, and at the system's log",
    errno.ESTALE: "see that the shared folder is still there, and start again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: the machine has no open files left",
}


def explain(error: Exception, arguments: Sequence[str]) -> tuple[str, int]:
    """The text for standard error and the exit code. arguments: the command line without `trimtab`."""
    if isinstance(error, UserError):
        if error.is_bug:  # that of a worker, whose traceback is in the message
            return _bug_report(str(error), type(error).__name__, arguments), BUG_CODE
        return f"trimtab {arguments[0]}: error: {error}\n", error.exit_code
    if isinstance(error, OSError) and error.errno in _SYSTEM_REFUSALS:
        reason, code = os.strerror(error.errno), 2 if error.errno == errno.ENAMETOOLONG else 1
        place = f"{error.filename}: " if error.filename else ""
        return f"trimtab {arguments[0]}: error: {place}{reason}; {_SYSTEM_REFUSALS[error.errno]}\n", code
    if isinstance(error, RuntimeError) and str(error) == _NO_HOME:
        way_out = "set HOME, or write the path in full (that of the prepared text is --data.cache_dir)"
        return f"trimtab {arguments[0]}: error: no home folder is known for a path that begins with ~; {way_out}\n", 2
    trace = "".join(traceback.format_exception(error))
    return _bug_report(trace, type(error).__name__, arguments), BUG_CODE


def _bug_report(trace: str, kind: str, arguments: Sequence[str]) -> str:
    versions = ", ".join(f"{name} {_version(name)}" for name in ("trimtab", "torch", "ray"))
    return (
        f"{trace.rstrip()}\n\n"
        f"trimtab: this is a bug in Trimtab ({kind}), not a mistake of yours. Please report it to the maintainers, "
        "with the text above and these two lines:\n"
        f"  command:  {shlex.join(['trimtab', *arguments])}\n"
        f"  versions: {versions}, Python {platform.python_version()}, {platform.platform()}\n"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
