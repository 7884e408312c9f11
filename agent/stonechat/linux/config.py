"""The daemon's configuration: one TOML file, read once, every key of config_keys.py checked."""

import tomllib
from os.path import isfile

from ..errors import ConfigError
from . import respond, shipped
from .config_checks import toml
from .config_keys import KEYS, REQUIRED
from .files import read_regular

MAX_BYTES = 1 << 20  # of the file
_MAX_SHOWN = 60  # characters of a value in a message


def load(path: str) -> dict:
    """path -> {section: {key: value}} with every default filled in. Raises ConfigError naming file, key and fix."""
    data, _ = read_regular(path, MAX_BYTES + 1, "can't read")
    if len(data) > MAX_BYTES:
        raise ConfigError("%s is larger than %d bytes" % (path, MAX_BYTES))
    try:
        config = check(tomllib.loads(data.decode("utf-8-sig").replace("\r\n", "\n")), path)
    except RecursionError:
        raise ConfigError("%s is not TOML that can be read: brackets nested too deeply" % path)
    except UnicodeDecodeError as error:
        raise ConfigError("%s is not TOML: it is not UTF-8 (%s)" % (path, error.reason))
    except ValueError as error:  # tomllib.TOMLDecodeError, and a number of thousands of digits
        raise ConfigError("%s is not TOML: %s" % (path, str(error)[:200]))
    for section, name in (("model", "file"), ("collector", "service_model")):
        file = config[section][name]
        config[section][name] = shipped.path(file)
        wanted = section == "model" or config["collector"]["services"]
        if wanted and "/" not in file and config[section][name] == file and not isfile(file):
            names = ", ".join(shipped.names())
            raise ConfigError(
                "%s: [%s] %s %s: no such file; models of the package: %s" % (path, section, name, file, names)
            )
    return config


def check(raw: dict, path: str = "config") -> dict:
    """raw: what the TOML file said -> the whole configuration. Raises ConfigError."""
    for section in raw:
        if section not in KEYS:
            raise ConfigError("%s: unknown section [%s]%s" % (path, _shown(section)[1:-1], _nearest(section, KEYS)))
        if not isinstance(raw[section], dict):
            raise ConfigError("%s: %s must be a section: [%s]" % (path, section, section))
    config: dict = {}
    for section, keys in KEYS.items():
        given = raw.get(section, {})
        for name in given:
            if name not in keys:
                raise ConfigError(
                    "%s: [%s] has no key %s%s" % (path, section, _shown(name)[1:-1], _nearest(name, keys))
                )
        config[section] = {}
        for name, key in keys.items():
            value = given.get(name, key.default)
            if value is REQUIRED:
                raise ConfigError("%s: [%s] needs %s = %s" % (path, section, name, toml(key.example)))
            wrong = key.check(value)
            if wrong:
                wrong = _printable(wrong)  # it may quote a part of the value
                raise ConfigError("%s: [%s] %s must be %s, not %s" % (path, section, name, wrong, _shown(value)))
            config[section][name] = value
    response = [config["response"][name] for name in ("rules", "lease_s", "self_renew_s", "hook")]
    wrong = respond.check_together(*response)
    if wrong:
        raise ConfigError("%s: [response] %s" % (path, wrong))
    return config


def _shown(value) -> str:
    """A wrong value, as far as it fits into a message."""
    try:
        text = toml(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        text = "something of that size"
    text = _printable(text[: _MAX_SHOWN + 1])
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _printable(text: str) -> str:
    return "".join([c if c.isprintable() else "?" for c in text])


def _nearest(word: str, words) -> str:
    from difflib import get_close_matches  # only on the way to an error: costs memory

    close = get_close_matches(word[:_MAX_SHOWN], list(words), 1)
    return "; is it %s?" % close[0] if close else "; known: " + ", ".join(words)


def example() -> str:
    """A complete commented configuration: required keys set to a sample, the others commented out at their default."""
    lines = ["# stonechat-agent: every key there is. What is commented out shows its default."]
    for section, keys in KEYS.items():
        lines += ["", "[%s]" % section]
        for name, key in keys.items():
            lines += ["# " + line for line in key.doc.split("\n")]
            shown = key.example if key.default is REQUIRED else key.default
            lines.append("%s%s = %s" % ("" if key.default is REQUIRED else "# ", name, toml(shown)))
    return "\n".join(lines) + "\n"
