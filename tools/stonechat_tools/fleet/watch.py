"""Which files of a folder have changed, without looking at each: inotify, where the folder is on a local disk."""

import contextlib
import ctypes
import os
import struct
from pathlib import Path

# linux/inotify.h: IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE, IN_MODIFY
_CONTENT = 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x2
_ALL = 0x2000 | 0x4000 | 0x8000 | 0x400 | 0x800  # IN_UNMOUNT, IN_Q_OVERFLOW, IN_IGNORED, IN_DELETE_SELF, IN_MOVE_SELF
_ONLY_FOLDER = 0x01000000
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "f2fs", "ramfs", "squashfs", "bcachefs"}


def _is_local(folder: Path) -> bool:
    """Whether every change to the folder is made on this machine: another one's changes raise no event here."""
    found = os.stat(folder).st_dev
    name = f"{os.major(found)}:{os.minor(found)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        fields = line.split()
        if len(fields) > 6 and fields[2] == name:
            return fields[fields.index("-", 6) + 1] in _LOCAL
    return False


class Watch:
    """Raises OSError where the folder can't be watched; whoever asks then has to look at the files."""

    def __init__(self, folder: Path) -> None:
        self._handle = -1
        if not _is_local(folder):
            raise OSError("not on a local disk")
        libc = ctypes.CDLL(None, use_errno=True)
        self._folder = folder
        self._handle = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._handle < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        found = os.stat(folder)
        self._inode = (found.st_dev, found.st_ino)
        if libc.inotify_add_watch(self._handle, os.fsencode(folder), _CONTENT | _ALL | _ONLY_FOLDER) < 0:
            error = ctypes.get_errno()
            self.close()
            raise OSError(error, "inotify_add_watch")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._handle)

    def __del__(self) -> None:
        self.close()
        self._handle = -1

    def changed(self) -> set[str] | None:
        """Names of the files that were changed since the last call; None where all may have been, and then the watch
        is at its end. Raises OSError where there is no folder any more."""
        found = os.stat(self._folder)
        names: set[str] = set()
        while True:
            try:
                data = os.read(self._handle, 65_536)
            except BlockingIOError:
                break
            at = 0
            while at + 16 <= len(data):
                _, mask, _, length = struct.unpack_from("iIII", data, at)
                if mask & _ALL:
                    return None
                names.add(os.fsdecode(data[at + 16 : at + 16 + length].rstrip(b"\0")))
                at += 16 + length
        return names if (found.st_dev, found.st_ino) == self._inode else None
