"""Two files or folders exchange their names in one step, which nobody sees half done."""

import ctypes
import errno
import os
import sys

_HERE = -100  # AT_FDCWD of Linux: names are relative to the current directory
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, and RENAME_SWAP of macOS
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


def exchange(one, other) -> bool:
    """Exchange the names of two files or folders of one file system. False where that is not possible in one step.

    Raises:
        OSError: it is possible and failed.
    """
    names = os.fsencode(one), os.fsencode(other)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = library.renamex_np(*names, _EXCHANGE)
        else:
            failed = library.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE)
    except (AttributeError, OSError, TypeError):  # no such function, or on Windows no such library
        return False
    if failed and (code := ctypes.get_errno()) not in _CANNOT:
        raise OSError(code, os.strerror(code), os.fspath(one))
    return not failed
