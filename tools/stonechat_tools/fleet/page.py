"""`collect --dashboard`: `stonechat dashboard` beside the collector, in a process of its own that holds no key."""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable

from stonechat.errors import StonechatError

from .store import URLS
from .store.postgres import has_password

START_S = 120.0
END_S = 10.0
_PR_SET_PDEATHSIG = 1


def _with_its_parent() -> Callable[[], None] | None:
    """For the new process: it ends with this one, also after a kill -9. None where that is not Linux."""
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Page:
    """db: a file or a URL; listen: HOST:PORT. `url` is where it is. Raises StonechatError where it does not start; why
    is on stderr, in its own line."""

    def __init__(self, db: str, listen: str) -> None:
        secret: int | None = None
        where = ["--db", db]
        if db.startswith(URLS) and has_password(db):  # everybody sees the arguments of a process
            secret = os.memfd_create("database")
            os.fchmod(secret, 0o600)
            os.write(secret, db.encode() + b"\n")
            where = ["--database-file", f"/proc/self/fd/{secret}"]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stonechat_tools.cli", "dashboard", *where, "--listen", listen, "--json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=() if secret is None else (secret,),
                preexec_fn=_with_its_parent(),
            )
        finally:
            if secret is not None:
                os.close(secret)
        assert self._process.stdout
        try:
            line = self._process.stdout.readline() if select.select([self._process.stdout], [], [], START_S)[0] else b""
            self.url = str(json.loads(line)["url"])
        except ValueError:
            self.close()
            raise StonechatError(f"--dashboard {listen}: it does not start; its own line says why") from None
        except BaseException:
            self.close()
            raise

    @property
    def error(self) -> str | None:
        status = self._process.poll()
        return (
            None if status is None else f"the dashboard has ended (status {status}); reports are collected all the same"
        )

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
