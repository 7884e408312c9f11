"""The bundle that `stonechat provision add` makes for one device and `stonechat-agent install` takes.

A tar archive (ustar, POSIX.1-1988) of regular files with names from FILES and nothing else: no folder, link, path,
extension, duplicate or larger file. Anything else is refused as a whole, before a byte of it is used.
"""

import os

from ..errors import ConfigError

# name: (most bytes, mode once installed, may only the agent's user read it)
FILES = {
    "stonechat.toml": (65_536, 0o640, False),
    "device.key": (256, 0o600, True),
    "ca.crt": (65_536, 0o644, False),
    "client.crt": (65_536, 0o644, False),
    "client.key": (16_384, 0o600, True),
    "password": (1_024, 0o600, True),
    "model.tflite": (1 << 20, 0o644, False),
    "counters.tflite": (1 << 20, 0o644, False),
}
REQUIRED = ("stonechat.toml", "device.key")
_BLOCK = 512
MAX_BYTES = sum(most + 2 * _BLOCK for most, _, _ in FILES.values()) + 20 * _BLOCK  # tar pads to 20 blocks at most


def read(path: str) -> dict:
    """The file of a bundle -> {name: bytes}. Raises ConfigError, which says what is wrong with it."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError("bundle %s: %s" % (path, error.strerror))
    if len(data) > MAX_BYTES:
        raise ConfigError("bundle %s is larger than %d bytes" % (path, MAX_BYTES))
    try:
        return parse(data)
    except ValueError as error:
        raise ConfigError("bundle %s: %s; `stonechat provision add` makes one" % (path, error))


def parse(data: bytes) -> dict:
    """The bytes of a bundle -> {name: bytes}. Raises ValueError."""
    found: dict = {}
    at = 0
    while True:
        head = data[at : at + _BLOCK]
        if len(head) < _BLOCK:
            raise ValueError("not a tar archive, or cut off")
        if not any(head):
            break
        name, size = _member(head)
        if name in found:
            raise ValueError("it holds %s twice" % name)
        at += _BLOCK
        if at + size > len(data):
            raise ValueError("cut off in %s" % name)
        found[name] = data[at : at + size]
        at += -(-size // _BLOCK) * _BLOCK
    if any(data[at:]):
        raise ValueError("there is something behind its end")
    for name in REQUIRED:
        if name not in found:
            raise ValueError("it lacks %s" % name)
    return found


def _member(head: bytes) -> "tuple[str, int]":
    """A header block -> (name, size in bytes)."""
    if head[257:263] != b"ustar\0" or head[263:265] != b"00":
        raise ValueError("not a ustar archive")
    if _octal(head[148:156]) != sum(head[:148]) + 8 * 32 + sum(head[156:]):
        raise ValueError("a damaged header")
    name = _text(head[:100])
    if name not in FILES or any(head[345:500]):  # a prefix would be a path
        raise ValueError("%r is not a file of a bundle; those are %s" % (name[:60], ", ".join(FILES)))
    if head[156:157] not in (b"0", b"\0") or any(head[157:257]):
        raise ValueError("%s is not a regular file" % name)
    size = _octal(head[124:136])
    if size > FILES[name][0]:
        raise ValueError("%s has %d bytes, at most %d are taken" % (name, size, FILES[name][0]))
    return name, size


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("ascii", "replace")


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits or any(digit not in b"01234567" for digit in digits):
        raise ValueError("a damaged header")
    return int(digits, 8)


def readable_by_others(path: str) -> bool:
    return bool(os.stat(path).st_mode & 0o077)


def settings_of(files: dict, folder: str) -> dict:
    """The bundle's configuration, checked as the agent will. folder: where install puts the files. Raises
    ConfigError."""
    import tomllib  # only here, with what follows: who writes a bundle does without

    from . import config

    try:
        raw = tomllib.loads(files["stonechat.toml"].decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("the bundle's stonechat.toml is not TOML: %s" % error)
    settings = config.check(raw, "the bundle's stonechat.toml")
    if settings["device"]["key_file"] != folder + "/device.key":
        raise ConfigError(
            "the bundle is for a device with its key in %s; install puts it into %s: provision with --install-dir %s"
            % (settings["device"]["key_file"], folder + "/device.key", folder)
        )
    try:
        good = len(bytes.fromhex(files["device.key"].decode().strip())) == 32
    except ValueError:
        good = False
    if not good:
        raise ConfigError("the bundle's device.key is not 64 hexadecimal digits")
    return settings
