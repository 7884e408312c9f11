"""Checks of the configuration's values: each takes a value and returns None, or the words that follow "must be"."""

import socket

MAX_TEXT_BYTES = 1024
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def integer(low: int, high: int):
    def check(value) -> str | None:
        good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if good else "a whole number from %d to %d" % (low, high)

    return check


def _is_text(value, most: int = MAX_TEXT_BYTES) -> bool:
    """No NUL, no line break: such a text is no path, no name and no topic."""
    return isinstance(value, str) and len(value.encode()) <= most and (value == "" or value.isprintable())


def text(value) -> str | None:
    return None if _is_text(value) else "a text in quotes, printable, at most %d bytes" % MAX_TEXT_BYTES


def filled(value) -> str | None:
    return text(value) or (None if value else "a text in quotes, not empty")


def device_id(value) -> str | None:
    good = _is_text(value, 64) and not set(value) - _ID_CHARACTERS and set(value) - set("-_.")
    return None if good else "a text of 1 to 64 letters, digits, - _ . without / + # and not of - _ . alone"


def fleet(value) -> str | None:
    good = _is_text(value, 64) and value and not set(value) & set("/+#")
    return None if good else "a text of 1 to 64 bytes without / + # (it becomes part of an MQTT topic)"


def prefix(value) -> str | None:
    good = _is_text(value, 128) and value and not set(value) & set("+#") and value[0] != "$"
    return None if good else "a text of 1 to 128 bytes without + # and no $ in front (every topic begins with it)"


def firmware(value) -> str | None:
    return None if _is_text(value, 64) else "a text of at most 64 bytes"


def device_class(value) -> str | None:
    return None if _is_text(value, 32) else "a text of at most 32 bytes"


def host(value) -> str | None:
    try:
        good = _is_text(value, 253) and value and not set(value) & set(" /[]@") and len(value.encode("idna")) <= 253
        if good and ":" in value:
            socket.inet_pton(socket.AF_INET6, value.split("%")[0])
    except (UnicodeError, OSError):
        good = False
    words = "a name or an address without scheme, port and [] (a host's name has no blank, no empty or long part)"
    return None if good else words


def user(value) -> str | None:
    good = _is_text(value, 32) and value.isascii() and not set(value) & set(" :/")
    return None if good else "the name or the number of a user"


def alpn(value) -> str | None:
    return None if _is_text(value, 255) and value.isascii() else "a text of at most 255 ASCII characters"


def absolute(value) -> str | None:
    good = text(value) is None and (not value or value[0] == "/" and ".." not in value.split("/"))
    return None if good else "an absolute path without .., or empty"


def flag(value) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def one_of(*choices):
    def check(value) -> str | None:
        if any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            return None
        return "one of " + ", ".join(toml(choice) for choice in choices)

    return check


def texts(value) -> str | None:
    good = isinstance(value, list) and all(_is_text(item) and item for item in value)
    return None if good else "a list of texts"


def tables(value) -> str | None:
    rows = value if isinstance(value, list) else [None]
    good = all(isinstance(row, dict) and all(_is_text(each) for each in row.values()) for row in rows)
    return None if good else 'a list like [{name = "openings", unit = "1", kind = "rate", path = "/run/door/openings"}]'


def toml(value) -> str:
    """A value as the file spells it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"%s"' % value.replace("\\", "\\\\").replace('"', '\\"')
    if isinstance(value, list):
        return "[%s]" % ", ".join(toml(item) for item in value)
    return str(value)
