"""A planned sleep on its way from `stonechat-agent --announce-sleep` to the running agent: a file beside its state.

The file holds the seconds. The agent sends the status and removes the file once the broker has acknowledged it; whoever
wrote it waits for that, and suspends the machine then.
"""

import os

from ..compat import sleep_ms
from ..errors import ConfigError
from .files import read_regular

MOST_S = 366 * 86_400
_WAIT_MS = 15_000
_STEP_MS = 100


def path_of(state_file: str) -> str:
    return state_file + ".sleep"


def announce(state_file: str, seconds: int, wait_ms: int = _WAIT_MS) -> None:
    """Ask the agent that keeps `state_file` to announce a sleep, and wait until the broker has it. Raises ConfigError
    with the fix, OSError."""
    if not 1 <= seconds <= MOST_S:
        raise ConfigError("--announce-sleep %d: from 1 to %d seconds" % (seconds, MOST_S))
    path = path_of(state_file)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise ConfigError("%s is there: another announcement waits; remove it if none does" % path)
    except OSError as error:
        raise ConfigError("%s: %s; run it as root or as the agent's user" % (path, error.strerror))
    try:
        with open(fd, "w") as file:
            os.fchmod(fd, 0o644)  # whatever the umask: the agent is another user
            file.write("%d\n" % seconds)
    except OSError as error:
        os.unlink(path)
        raise ConfigError("%s: %s" % (path, error.strerror))
    announced = False
    try:
        for _ in range(0, wait_ms, _STEP_MS):
            sleep_ms(_STEP_MS)
            if not os.path.lexists(path):
                break
    finally:  # also where this is interrupted: the agent must not announce it some other day
        try:
            os.unlink(path)
        except FileNotFoundError:
            announced = True
    if not announced:
        raise ConfigError(
            "the sleep was not announced: no agent runs with this configuration, it has no connection, or bytes_per_day"
            " are spent"
        )


class Announcements:
    """The agent's side; turn() is called about once a second."""

    def __init__(self, state_file: str) -> None:
        self._path = path_of(state_file)
        self._sent = False

    def connected(self) -> None:
        """There is a new connection: what was on its way over the last one may be lost, so it is announced again."""
        self._sent = False

    def turn(self, agent, transport) -> None:
        """Raises OSError or a StonechatError: then nothing is announced, and the next turn is another try."""
        if not self._sent:
            if not transport.connected or not os.path.lexists(self._path):
                return
            data, _ = read_regular(self._path, 32, "planned sleep")
            if not data:
                return  # it is being written
            text = data.decode("ascii", "replace").strip()
            if not text.isdigit() or not 1 <= int(text) <= MOST_S:
                os.unlink(self._path)
                raise ConfigError("planned sleep %s: not a number of seconds; removed" % self._path)
            self._sent = agent.announce_sleep(int(text))
        elif transport.connected and not transport.in_flight:
            self._sent = False
            os.unlink(self._path)
