"""Giving up privileges once everything is attached: another user, no capabilities, no way back.

What was attached stays: reading the counters is reading memory. After the change of user the process is not dumpable,
so that nobody but root may trace it or read its memory (the device's key); root-owned files under /proc/self can't be
opened any more, which is why collectors open theirs before.
"""

import os

from ..errors import ConfigError

_CAP_NET_ADMIN = 12
_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_FALLBACK_USERS = ("stonechat", "nobody")


def user_ids(user: str = "") -> "tuple[int, int]":
    """user: a name, a number, or "" for `stonechat` where there is one, else `nobody` -> (user id, group id). Raises
    ConfigError for an unknown one, and for root."""
    import pwd

    names = (user,) if user else _FALLBACK_USERS
    for name in names:
        try:
            entry = pwd.getpwuid(int(name)) if name.isascii() and name.isdigit() else pwd.getpwnam(name)
        except (KeyError, ValueError, OverflowError):
            continue
        if entry.pw_uid == 0:
            raise ConfigError("[collector] user %s is root; name an ordinary user" % name)
        return entry.pw_uid, entry.pw_gid
    raise ConfigError(
        "no user called %s: useradd --system --no-create-home --shell /usr/sbin/nologin %s"
        % (" or ".join(names), names[0])
    )


def drop(user: str = "", keep_net_admin: bool = False) -> None:
    """Become `user` (where started as root) and drop every capability from every set, for good. keep_net_admin leaves
    CAP_NET_ADMIN, and that alone, for responses. Raises ConfigError for an unknown user, OSError where the kernel
    refuses; afterwards status() gives what is left."""
    if os.getuid() and not keep_net_admin and not any(status()[1:]):
        _no_new_privileges_if_loaded()
        return
    libc = _libc()
    kept = 1 << _CAP_NET_ADMIN if keep_net_admin else 0
    for capability in range(64):  # while CAP_SETPCAP is still there; the last capability's number depends on the kernel
        if not kept >> capability & 1 and libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break
    if os.getuid() == 0:
        user_id, group_id = user_ids(user)
        if kept:
            _check(libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "keep capabilities")
        os.setgroups([])
        os.setresgid(group_id, group_id, group_id)
        os.setresuid(user_id, user_id, user_id)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _set_capabilities(libc, kept)
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "forbid new privileges")


def status(path: str = "/proc/self/status") -> "tuple[int, int, int, int, int]":
    """-> (user id, permitted, effective, inheritable, ambient capabilities) as the kernel reports them."""
    found = {}
    with open(path) as file:
        for line in file:
            key, _, text = line.partition(":")
            found[key] = text.split()
    sets = [int(found[key][0], 16) for key in ("CapPrm", "CapEff", "CapInh", "CapAmb")]
    return (int(found["Uid"][1]), sets[0], sets[1], sets[2], sets[3])


def _libc():
    import ctypes  # loaded with BPF anyway; without it only where there is something to drop

    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        import ctypes

        code = ctypes.get_errno()
        raise OSError(code, "can't %s: %s" % (what, os.strerror(code)))


def _set_capabilities(libc, kept: int) -> None:
    import struct

    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    sets = struct.pack("=6I", kept & 0xFFFFFFFF, kept & 0xFFFFFFFF, 0, kept >> 32, kept >> 32, 0)
    _check(libc.capset(header, sets), "set capabilities")


def _no_new_privileges_if_loaded() -> None:
    """An ordinary process has nothing to drop; the flag is set where ctypes is there anyway, and by systemd's unit."""
    import sys

    if "ctypes" in sys.modules:
        _check(_libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "forbid new privileges")
