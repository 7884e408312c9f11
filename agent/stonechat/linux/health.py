"""How the running agent is, for `stonechat doctor`: a few lines of text beside the state file."""

import os

from .. import __version__
from ..compat import epoch_s, replace, ticks_add, ticks_diff, ticks_ms

_EVERY_MS = 60_000  # at most, for the counts; what is lacking is written at once


class HealthFile:
    """state_file: path of the agent's state."""

    def __init__(self, state_file: str) -> None:
        self._path = state_file + ".health"
        self._written: tuple = (None,)
        self._due_ms = ticks_ms()

    def turn(self, agent) -> None:
        """Write what has changed, if it is time."""
        health = (agent.lacks, tuple(agent.unscored), agent.windows // 360)
        now_ms = ticks_ms()
        if health != self._written and (health[0] != self._written[0] or ticks_diff(now_ms, self._due_ms) >= 0):
            self._written = health
            self._due_ms = ticks_add(now_ms, _EVERY_MS)
            self.write(agent)

    def write(self, agent) -> None:
        """As it is now. Lost where the medium refuses."""
        text = "pid %d\nversion %s\ntime %d\nwindows %d\nunscored %s\nlacks %s\n" % (
            os.getpid(),
            __version__,
            epoch_s(),
            agent.windows,
            " ".join([str(count) for count in agent.unscored]),
            agent.lacks,
        )
        path = self._path + ".tmp"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "w") as file:
                file.write(text)
            replace(path, self._path)
        except OSError:
            pass
