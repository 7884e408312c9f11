"""The daemon's files and folders: bounded reading, secrets, folders of its own, one instance for each of them."""

import errno
import fcntl
import os
import stat

from ..errors import ConfigError

MODEL_MAX_BYTES = 1 << 20
_LINE_BYTES = 1024
_LOOKED_AT = 200  # files of a folder


def read_regular(path: str, most: int, what: str) -> "tuple[bytes, int]":
    """-> (up to `most` bytes of a file, its mode). Never waits, as for a FIFO. Raises ConfigError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise ConfigError("%s %s: %s" % (what, path, getattr(error, "strerror", None) or error))
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise ConfigError("%s %s is not a file" % (what, path))
    with open(fd, "rb") as file:
        try:
            return file.read(most), mode
        except OSError as error:
            raise ConfigError("%s %s: %s" % (what, path, error.strerror))


def read_file(path: str, what: str) -> bytes:
    """A model file's bytes. Raises ConfigError where it can't be read or is too large."""
    if not os.path.lexists(path):
        raise ConfigError("%s %s: No such file; put one there, or name one that comes with the package" % (what, path))
    data, _ = read_regular(path, MODEL_MAX_BYTES + 1, what)
    if len(data) > MODEL_MAX_BYTES:
        raise ConfigError("%s %s is larger than %d bytes" % (what, path, MODEL_MAX_BYTES))
    return data


def check_private(path: str, mode: int, what: str) -> None:
    """Raises ConfigError with the fix where others than its owner may use the file."""
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError("%s %s is open to others (mode %03o): chmod 600 %s" % (what, path, mode & 0o777, path))


def read_secret(path: str, what: str) -> bytes:
    """The first line of a file that nobody else may read. Raises ConfigError with the fix."""
    data, mode = read_regular(path, _LINE_BYTES, what)
    line = data.split(b"\n", 1)[0].strip()
    check_private(path, mode, what)
    if not line:
        raise ConfigError("%s %s is empty" % (what, path))
    return line


def read_text(path: str, what: str) -> str:
    """A secret that is text. Raises ConfigError."""
    try:
        return read_secret(path, what).decode()
    except UnicodeDecodeError:
        raise ConfigError("%s %s is not UTF-8 text" % (what, path))


def read_key(path: str) -> bytes:
    """The device's secret: 64 hexadecimal digits -> 32 bytes. Raises ConfigError."""
    line = read_secret(path, "[device] key_file")
    try:
        key = bytes.fromhex(line.decode())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(
            "[device] key_file %s must hold 64 hexadecimal digits (`stonechat provision` makes it)" % path
        )
    return key


def grant_folder(folder: str, user_id: int) -> None:
    """As root: make the first missing part of `folder`, mode 0700, for the user that the process becomes, who makes the
    rest (make_folder). What is there already keeps its owner, and nothing is made below a folder that is not root's:
    who owns that could put a link there. Raises OSError."""
    path = "/"
    for name in folder.split("/"):
        if not name:
            continue
        if os.stat(path).st_uid:
            return
        path = os.path.join(path, name)
        if not os.path.lexists(path):
            os.mkdir(path, 0o700)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fchown(fd, user_id, -1)
            finally:
                os.close(fd)
            return


def make_folder(folder: str) -> None:
    """As the agent's own user. Raises OSError."""
    os.makedirs(folder, 0o700, exist_ok=True)


def unreadable(path: str) -> str:
    """Why this user can't read a file that is there, with the fix; "" where it can."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    if not stat.S_ISREG(found.st_mode) or os.access(path, os.R_OK):
        return ""
    return "%s can't be read: %s" % (path, _fix(path, found, 0o600))


def _fix(path: str, found: os.stat_result, mode: int) -> str:
    if found.st_uid == os.geteuid():
        return "its mode is %03o: chmod %o %s" % (found.st_mode & 0o777, mode, path)
    return "it belongs to user %d: chown %d %s" % (found.st_uid, os.geteuid(), path)


def folder_trouble(folder: str) -> str:
    """Why nothing can be written to the folder, with the fix; "" where it can."""
    try:
        found = os.stat(folder)
    except OSError as error:
        return "%s: %s; make it: install -d -m 700 -o %d %s" % (folder, error.strerror, os.geteuid(), folder)
    if not stat.S_ISDIR(found.st_mode):
        return "%s is not a folder" % folder
    if os.access(folder, os.W_OK | os.X_OK):
        found_in = [os.path.join(folder, name) for name in sorted(os.listdir(folder))[:_LOOKED_AT]]
        return next(filter(None, map(unreadable, found_in)), "")
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return "%s is on a read-only file system" % folder
    return "%s can't be used: %s" % (folder, _fix(folder, found, 0o700))


def make_trouble(folder: str, as_root: bool) -> str:
    """folder_trouble of a folder that is made where it is missing: by this user, or (as_root) by grant_folder, which
    makes it below what is root's."""
    place = folder
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if place != folder and as_root and os.path.isdir(place) and not os.stat(place).st_uid:
        return ""
    trouble = folder_trouble(place)
    if trouble and place != folder and os.path.isdir(place) and "read-only" not in trouble:
        # the folder above is often the system's: it keeps its owner
        what = "user %d can't make %s" % (os.geteuid(), folder)
        return what + ": as root, install -d -m 700 -o %d %s; or name folders of its own" % (os.geteuid(), folder)
    return trouble


def lock_folder(folder: str) -> int:
    """One instance for each folder: an open file that holds the lock until the process ends, -1 where the folder is not
    there or can't be read. Raises ConfigError where another process holds it."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BusyError(
                "another stonechat-agent uses %s: stop it first, or give this one a folder of its own" % folder
            )
        return -1
    return fd


class BusyError(ConfigError):
    """Another process has what this one needs; it may end."""
