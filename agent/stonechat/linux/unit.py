"""The systemd unit of this interpreter's agent, which its user must be able to reach."""

import os
import stat
import sys

from ..errors import ConfigError

USER = "stonechat"
ETC = "/etc/stonechat"
SERVICE = "stonechat-agent.service"
UNIT = "/etc/systemd/system/" + SERVICE
_HIDDEN = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")  # ProtectHome= and PrivateTmp= of the unit
_PLAIN = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._+-")


def agent_command(check: bool = True) -> list:
    """What starts the agent of this very interpreter. Raises ConfigError where the service could not reach it."""
    script = os.path.join(sys.prefix, "bin", "stonechat-agent")
    if not os.path.exists(script):  # not in a virtual environment: Debian's own Python, say
        script = os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), "stonechat-agent")
    if check:
        for path in (script, os.path.realpath(sys.executable), os.__file__, __file__):
            _check_reachable(path)
    if set(script) - _PLAIN:
        raise ConfigError("%s: the path of the agent must be of plain letters; %s" % (script, _FIX))
    return [script]


_FIX = (
    "install it so: /usr/bin/python3 -m venv /opt/stonechat && /opt/stonechat/bin/pip install 'stonechat[linux]' "
    "&& /opt/stonechat/bin/stonechat-agent install ... (in a clone '.[linux]' for 'stonechat[linux]')"
)


def _check_reachable(path: str) -> None:
    if path.startswith(_HIDDEN):
        raise ConfigError("%s is where the service can't see it (ProtectHome, PrivateTmp); %s" % (path, _FIX))
    at = path
    while True:
        try:
            mode = os.stat(at).st_mode
        except OSError as error:
            raise ConfigError("%s: %s; %s" % (at, error.strerror, _FIX))
        if not mode & (0o001 if stat.S_ISDIR(mode) else 0o004):
            raise ConfigError("the user %s can't read %s: chmod o+rX it, or %s" % (USER, at, _FIX))
        if at == "/":
            return
        at = os.path.dirname(at)


def unit_text(command: list) -> str:
    """The unit with the path of this interpreter's agent."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), SERVICE)) as file:
        lines = file.read().splitlines()
    start = "ExecStart=%s --config %s/stonechat.toml" % (" ".join(command), ETC)
    return "\n".join(start if line.startswith("ExecStart=") else line for line in lines) + "\n"
