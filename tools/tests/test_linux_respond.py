"""The response on Linux: rules from the configuration, and the vendor's hook as a real program."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stonechat.errors import ConfigError
from stonechat.linux import config, respond
from stonechat.linux.config import KEYS
from stonechat.linux.respond import Hook, LinuxResponse
from stonechat.policy import QUARANTINE
from stonechat.policy import check as check_rules


def defaults(**changes: object) -> dict[str, Any]:
    return {name: key.default for name, key in KEYS["response"].items()} | changes


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Any, within_s: float = 20) -> None:
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def number_in(path: Path) -> int:
    until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def test_the_hook_ends_and_is_reaped_and_its_status_is_reported() -> None:
    codes: list[int] = []
    hook = Hook(["sh", "-c", "exit 7"], 30, codes.append)
    hook.start({})
    pid = hook._pid
    with pytest.raises(BlockingIOError):
        hook.start({})
    until(lambda: hook.turn() or not hook._pid)
    assert codes == [7] and not Path(f"/proc/{pid}").exists()


def test_a_hook_that_runs_too_long_goes_with_its_children_and_nothing_waits_for_it(tmp_path: Path) -> None:
    codes: list[int] = []
    hook = Hook(["sh", "-c", f"sleep 600 & echo $! > {tmp_path}/child; wait"], 0, codes.append)
    hook.start({})
    pid, child = hook._pid, number_in(tmp_path / "child")
    hook.turn()
    assert codes == [124]
    until(lambda: hook.turn() or not hook._pid)
    until(lambda: not alive(child))
    assert codes == [124] and not Path(f"/proc/{pid}").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a program of another user")
def test_killing_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a program that has become another user, or hangs in a system call: SIGKILL does nothing at once."""
    codes: list[int] = []
    hook = Hook(["sleep", "4"], 0, codes.append)
    hook.start({})

    def refused(*_: int) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, "killpg", refused)
    hook.turn()
    hook.kill()
    assert hook._pid and alive(hook._pid)  # nobody waited for its end
    with pytest.raises(BlockingIOError):  # one at a time, also then
        hook.start({})
    until(lambda: hook.turn() or not hook._pid)
    assert codes == [124]
    hook.start({})
    monkeypatch.undo()
    hook.kill()
    until(lambda: hook.turn() or not hook._pid)


def test_a_parent_that_ignores_its_children_does_not_break_the_hook() -> None:
    """An agent that was started with SIGCHLD ignored keeps it so across exec."""
    code = (
        "import time\n"
        "from stonechat.linux.respond import Hook\n"
        "hook = Hook(['true'], 30, print)\n"
        "hook.start({})\n"
        "for _ in range(2000):\n"
        "    hook.turn()\n"
        "    if not hook._pid:\n"
        "        break\n"
        "    time.sleep(0.01)\n"
        "hook.start({})\n"
        "hook.kill()\n"
        "time.sleep(0.2)\n"
        "hook.turn()\n"
        "print('ended', hook._pid)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),  # noqa: PLW1509
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and done.stdout == "ended 0\n", done.stderr


def test_the_hook_inherits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of the agent")
    with open(tmp_path / "key", "w") as secret:
        script = f"env > {tmp_path}/env; ls -l /proc/self/fd > {tmp_path}/fds; yes"
        hook = Hook(["sh", "-c", script], 1, lambda code: None)
        hook.start({"STONECHAT_LEVEL": "alarm"})
        until(lambda: (tmp_path / "fds").exists() and (tmp_path / "fds").stat().st_size)
        assert f" {secret.fileno()} -> " in "".join(f" {fd} -> " for fd in os.listdir("/proc/self/fd"))
        hook.kill()
        until(lambda: hook.turn() or not hook._pid)
    names = {line.split("=")[0] for line in (tmp_path / "env").read_text().split("\n") if line}
    assert names - {"PWD", "SHLVL", "_", "OLDPWD"} == {"PATH", "STONECHAT_LEVEL"}
    open_files = (tmp_path / "fds").read_text()
    assert " 0 -> /dev/null" in open_files and str(tmp_path / "key") not in open_files


class Reporter:
    uptime_s = 0
    on_renewal = None

    def __init__(self) -> None:
        self.commands = SimpleNamespace(actions={}, mute_until_s=0, maintenance_until_s=0)
        self.decisions: list[list[int]] = []

    def decided(self, decision: list[int], verdict: object) -> None:
        self.decisions.append(decision)


class Broken:
    """A packet filter that takes a response, and then answers nothing but errors."""

    source = "broken"

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = None
        self.later = error

    def apply(self, action: int, seconds: int) -> None:
        self.error = self.later

    def turn(self) -> str:
        return str(self.counts()[0] and "")

    def counts(self) -> tuple[int, int]:
        if self.error:
            raise self.error
        return 0, 0

    def extend(self, seconds: int) -> None:
        self.counts()

    def release(self) -> None:
        self.counts()

    def essential(self) -> bool:
        return True

    def close(self) -> None:
        self.counts()


@pytest.mark.parametrize("error", [OSError(105, "no buffer space"), ValueError("not foreseen")])
def test_whatever_the_packet_filter_does_a_lease_ends(error: Exception) -> None:
    said: list[str] = []
    section = defaults(mode="on")
    response = LinuxResponse(section, Broken(error), {}, -1, "pump-1", lambda level, text: said.append(text))
    reporter = Reporter()
    agent = SimpleNamespace(
        reporter=reporter, state=SimpleNamespace(get=lambda name: None), off=False, announce=lambda: None
    )
    response.attach(agent)
    response.real.begin(0, QUARANTINE, 2, 0)
    for second in range(1, 5):
        reporter.uptime_s = second
        with contextlib.suppress(ValueError):  # the agent counts it
            response.turn()
    assert not response.real.action


# --- configuration ----------------------------------------------------------------------------------------------------


def test_what_the_check_takes_makes_rules_whatever_lease_s_is() -> None:
    for row in (
        {"action": "throttle", "most_seconds": 60},
        {"action": "quarantine", "seconds": 60},
        {"action": "quarantine", "seconds": 3600},
        {"action": "hook", "features": "files+programs"},
        {"action": "alert", "level": "watch", "windows": 1000},
    ):
        assert respond.check([row]) is None
        for lease_s in (1, 60, 61, 3600):
            if not respond.check_together([row], lease_s):
                check_rules(respond.rules_of([row], lease_s))


@pytest.mark.parametrize(
    "section, wanted",
    [
        ({"rules": [{"action": "throttle", "most_seconds": 60}]}, "rule 1: most_seconds 60 is below lease_s 120: give"),
        ({"rules": [{"action": "hook"}, {"action": "throttle", "most_seconds": 119}]}, "rule 2: most_seconds 119"),
        ({"allow": [{"address": "192.0.2.1\n\x1b[2J", "reason": "x"}]}, '"192.0.2.1??[2J" is no address'),
        ({"lease_s": 30, "self_renew_s": 59}, "self_renew_s 59 renews nothing: want 0, or two leases, 60"),
        ({"rules": [{"action": "alert"}], "hook": ["/bin/true"]}, 'no rule has action = "hook"'),
        ({"rules": [{"action": "throttle", "most_seconds": 60}], "lease_s": 60}, ""),
        ({"rules": [{"action": "throttle", "seconds": 60, "most_seconds": 60}], "self_renew_s": 120}, ""),
        ({"hook": ["/bin/true"]}, ""),
    ],
)
def test_keys_that_are_wrong_or_do_not_go_together_are_refused_in_one_line(
    section: dict[str, object], wanted: str
) -> None:
    raw = {
        "device": {"id": "pump-1", "key_file": "/k"},
        "mqtt": {"host": "h"},
        "model": {"file": "/m"},
        "response": section,
    }
    if wanted:
        with pytest.raises(ConfigError, match=re.escape(wanted)) as caught:
            config.check(raw)
        assert "[response]" in str(caught.value) and "\n" not in str(caught.value)
    else:
        config.check(raw)


@pytest.mark.parametrize(
    "value",
    [
        "throttle",
        [1],
        [{}],
        [{"action": "observe"}],
        [{"action": ["hook"]}],
        [{"action": "hook", "seconds": 5}],
        [{"action": "throttle", "seconds": 0}],
        [{"action": "throttle", "seconds": 3601}],
        [{"action": "throttle", "seconds": 10, "most_seconds": 9}],
        [{"action": "throttle", "seconds": True}],
        [{"action": "throttle", "seconds": 1.5}],
        [{"action": "throttle", "windows": -1}],
        [{"action": "throttle", "windows": 10**30}],
        [{"action": "throttle", "level": "normal"}],
        [{"action": "throttle", "features": ""}],
        [{"action": "throttle", "features": "network,files"}],
        [{"action": "throttle", "then": "hook"}],
        [{"action": "hook"}] * 17,
    ],
)
def test_wrong_rules_are_refused_in_one_line(value: object) -> None:
    text = respond.check(value)
    assert text and "\n" not in text
