"""Turns what the file system refuses into a line about the name or the disk, with the argument that holds the name."""

import errno
import os
import sys

from core.errors import InvalidValue, UserError

DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EIO,
    errno.ESTALE,
    errno.ENOTDIR,
}
"""The file system's answers that say that a folder can be written to no more."""
NOT_OURS = DISK | {
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EISDIR,
    errno.EEXIST,
    errno.EPERM,
    errno.EILSEQ,
}
"""The file system's answers that are about a name that was given, or about the disk."""


def about_a_file(error: BaseException) -> UserError | None:
    """Return what is wrong with a path, or the disk that it is on, with the field where the command line names it.

    None: the error is of another kind. A file that is missing is not among them, as it may well be a fault of ours.
    """
    if isinstance(error, OSError) and error.errno in NOT_OURS and isinstance(error.filename, str | bytes):
        name, reason, null = os.fsdecode(error.filename), str(error.strerror), False
    elif isinstance(error, ValueError) and "embedded null" in str(error):
        name, reason, null = "", "it has a null character in it", True
    else:
        return None
    for argument in reversed(sys.argv[1:]):
        field, equals, value = argument.partition("=")
        field, value = (field.lstrip("+~-"), value.strip("'\"")) if equals else ("argument", argument)
        if value and (value in name or (null and "\0" in value)):
            return InvalidValue(field, value, reason)
    return UserError(f"{name}: {reason}") if name else None
