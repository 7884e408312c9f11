"""Folders in .targets/ that the tests fill once: one worker fills each, the others wait for it."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

STAMP = "stamp"


def once(folder: Path, fill: Callable[[Path], None], wanted: str = "") -> Path:
    """`folder` as `fill(new)` left it, made anew where its stamp is not `wanted`. `fill` gets an empty folder that
    becomes `folder` when it returns: an exception leaves nothing behind."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / (folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = folder.parent / f"{folder.name}.{STAMP}"
        if not (folder.exists() and stamp.exists() and stamp.read_text() == wanted):
            new = folder.parent / (folder.name + ".new")
            for left in (new, folder):
                shutil.rmtree(left, ignore_errors=True)
            stamp.unlink(missing_ok=True)
            new.mkdir()
            fill(new)
            new.rename(folder)
            stamp.write_text(wanted)
    return folder
