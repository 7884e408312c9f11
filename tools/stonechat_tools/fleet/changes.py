"""Changes of a fleet's folder: one at a time, and one that was cut short is known as such."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from stonechat.errors import ConfigError


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process changes the folder, and keep the others waiting. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Unfinished:
    """The mark beside a device's secret while its files are made, which a full disk, ^C or a power cut may cut short.
    While it is there the device may have either its old key or its new one. A device that was never added whole may be
    added again; one whose rotation was cut short may not: it still has its old key."""

    def __init__(self, folder: Path, device: str) -> None:
        self._device = device
        self._marks = {act: folder / "secrets" / f"{device}.{act}" for act in ("add", "rotate")}

    def __contains__(self, act: str) -> bool:
        return self._marks[act].exists()

    @contextlib.contextmanager
    def marked(self, act: str) -> Iterator[None]:
        """The mark stays where the block fails. Raises OSError before anything is changed where it can't be made."""
        self._marks[act].touch(0o600)
        yield
        self.forget()

    def check(self) -> None:
        """Raises ConfigError where the last change was cut short."""
        for act in self._marks:
            if act in self:
                raise ConfigError(
                    f"{self._device}: `{act}` was cut short: run `stonechat provision {act} {self._device}`"
                )

    def forget(self) -> None:
        for mark in self._marks.values():
            mark.unlink(missing_ok=True)
