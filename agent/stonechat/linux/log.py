"""The daemon's log: lines on standard error, which may be full, closed or read by nobody without stopping the agent."""

import os
import select

from ..compat import ticks_add, ticks_diff, ticks_ms

PRIORITIES = {"error": 3, "warning": 4, "info": 6, "debug": 7}  # syslog(3), as journald reads them from standard error
_MAX_LINE_BYTES = 2000  # a pipe that is ready takes 4096 without blocking
_MAX_TROUBLES = 32
_AGAIN_MS = 3_600_000
_QUIET_MS = 10_000


class Log:
    """Lines on standard error; under systemd each carries its priority, so `journalctl -p warning` finds the alarms.
    A line that can't be written at once is dropped and counted; the next one that can says how many were."""

    def __init__(self, level: str, fd: int = 2) -> None:
        self._most = PRIORITIES[level]
        self._journal = "JOURNAL_STREAM" in os.environ
        self._fd = fd
        self.lost = 0

    def __call__(self, level: str, text: str) -> None:
        if PRIORITIES[level] > self._most:
            return
        if self.lost and self._write("warning", "%d lines of this log could not be written" % self.lost):
            self.lost = 0
        self.lost += not self._write(level, text)

    def _write(self, level: str, text: str) -> bool:
        prefix = "<%d>" % PRIORITIES[level] if self._journal else "stonechat-agent: %s: " % level
        clean = "".join([c if c.isprintable() else "?" for c in text[:_MAX_LINE_BYTES]])
        line = (prefix + clean).encode("utf-8", "backslashreplace")[:_MAX_LINE_BYTES] + b"\n"
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        try:
            ready = poller.poll(0)
            return bool(ready) and os.write(self._fd, line) == len(line)
        except OSError:  # full, closed, its reader gone
            return False


class Troubles:
    """What is wrong at present, each cause logged once a change: `say(subject, text)` for a cause, `over(subject)` when
    it is gone. A text that comes and goes is logged once an hour."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._now: dict = {}  # subject: (text, ticks of the last time it was said)
        self._logged: dict = {}  # (subject, text): when it may be logged again

    def say(self, subject: str, text: str) -> None:
        now_ms = ticks_ms()
        before = self._now.get(subject)
        self._now[subject] = (text, now_ms)
        if before is not None and before[0] == text:
            return
        key = (subject, text)
        due_ms = self._logged.get(key)
        if due_ms is not None and ticks_diff(now_ms, due_ms) < 0:
            return
        if len(self._logged) >= _MAX_TROUBLES:
            del self._logged[next(iter(self._logged))]
        self._logged[key] = ticks_add(now_ms, _AGAIN_MS)
        self._log("warning", "%s: %s" % (subject, text))

    def over(self, subject: str, quiet_ms: int = 0) -> bool:
        """quiet_ms: only where the subject has said nothing for that long -> True if it was in trouble."""
        before = self._now.get(subject)
        if before is None or ticks_diff(ticks_ms(), before[1]) < quiet_ms:
            return False
        del self._now[subject]
        return True

    def recovered(self, subject: str, quiet_ms: int = _QUIET_MS) -> None:
        """over(), and say so."""
        if self.over(subject, quiet_ms):
            for key in [key for key in self._logged if key[0] == subject]:
                del self._logged[key]
            self._log("info", subject + ": works again")
