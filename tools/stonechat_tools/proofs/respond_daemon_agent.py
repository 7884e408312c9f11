"""The real daemon, in a process that chaos may kill. Added to it: it prints when its packet filter does something, and
its clocks can be made to jump.

    python -m stonechat_tools.proofs.respond_daemon_agent CONFIG FOLDER FRAMES     in the device's namespace, as root

FOLDER has etc/resolv.conf; FRAMES: 1, or 0 for a kernel without the egress chain. Reads lines: `wall SECONDS`,
`suspended SECONDS` and `close`. Prints lines: WORD and a time of CLOCK_MONOTONIC in seconds.
"""

import functools
import os
import signal
import sys
import threading
import time
from typing import Any

from stonechat import compat

_ticks_ms, _epoch_s = compat.ticks_ms, compat.epoch_s
ahead = {"wall": 0, "suspended": 0}  # seconds
# before any module takes these by their names
compat.ticks_ms = lambda: _ticks_ms() + 1000 * ahead["suspended"]
compat.epoch_s = lambda: _epoch_s() + ahead["wall"]

from stonechat.linux import allow_list, daemon, netfilter  # noqa: E402
from stonechat.linux import config as configuration  # noqa: E402
from stonechat.linux.log import Log  # noqa: E402


def say(word: str, *more: str) -> None:
    print(word, *more, f"{time.monotonic():.6f}", flush=True)


class Reported(netfilter.Netfilter):
    frames_wanted = True

    def __init__(self, allow: Any, frames: bool = True, claim: Any = None) -> None:
        super().__init__(allow, frames and self.frames_wanted, claim)

    def apply(self, action: int, seconds: int) -> None:
        self._report("apply", functools.partial(super().apply, action, seconds))

    def extend(self, seconds: int) -> None:
        self._report("renew", functools.partial(super().extend, seconds))

    def release(self) -> None:
        in_force = self._until_ms is not None
        super().release()
        if in_force:
            say("ended")

    @staticmethod
    def _report(what: str, call: "functools.partial[None]") -> None:
        say("applying" if what == "apply" else "renewing")
        try:
            call()
        except OSError as error:
            say("refused", str(error).replace(" ", "_"))
            raise
        say("applied" if what == "apply" else "renewed")


def _listen() -> None:
    for line in sys.stdin:
        word, *rest = line.split()
        if word in ahead:
            ahead[word] = int(rest[0]) if word == "wall" else ahead[word] + int(rest[0])
        elif word == "close":
            break
    os.kill(os.getpid(), signal.SIGTERM)


def main(config: str, folder: str, frames: bool) -> int:
    netfilter.AllowList = functools.partial(allow_list.AllowList, root=folder)  # type: ignore[attr-defined,assignment]
    netfilter.Netfilter = Reported  # type: ignore[misc]
    Reported.frames_wanted = frames
    made = daemon.Daemon(configuration.load(config), Log("info"))
    say("started")
    threading.Thread(target=_listen, daemon=True).start()
    made.run()
    say("closed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2], sys.argv[3] == "1"))
