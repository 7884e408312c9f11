"""The agent's process: its exit statuses, its standard files, its memory, and the line about an error that ends it."""

import gc
import os
import sys

from ..errors import StonechatError
from .files import BusyError

# Exit statuses; the unit's RestartPreventExitStatus names those after which a restart can't help.
EXIT_CONFIG = 1  # configuration, model or sources: somebody must change something
EXIT_UNFORESEEN = 70  # sysexits.h: EX_SOFTWARE
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL: another instance runs, or the system refused something


def give_memory_back() -> None:
    """What the start has used and freed, where glibc can and ctypes is there anyway."""
    gc.collect()
    trim = "ctypes" in sys.modules and getattr(sys.modules["ctypes"].CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def describe(error: BaseException) -> str:
    """An exception that nothing foresaw, and where it came from, in one line."""
    where = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        where = "%s:%d" % (os.path.basename(code.co_filename), trace.tb_lineno)
        trace = trace.tb_next
    return "%s at %s (please report it)" % (repr(error)[:300], where)


def exit_status(error: Exception) -> int:
    return EXIT_CONFIG if isinstance(error, StonechatError) and not isinstance(error, BusyError) else EXIT_TRY_AGAIN


def keep_standard_files() -> None:
    """Where 0, 1 or 2 is closed, the next file opened would get its number, and the log."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
