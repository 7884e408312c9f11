"""The configuration: whatever is wrong gets one clear error that names the key and the fix."""

import os
import tomllib
from typing import Any

import pytest
from stonechat.errors import ConfigError
from stonechat.linux import config, files, privileges
from stonechat.linux.config_keys import KEYS

GOOD = """
[device]
id = "pump-17"
key_file = "/etc/stonechat/device.key"
[model]
file = "/etc/stonechat/model.tflite"
[mqtt]
host = "broker.example.org"
"""


def load(tmp_path: Any, text: str) -> dict[str, Any]:
    path = tmp_path / "stonechat.toml"
    path.write_text(text)
    return dict(config.load(str(path)))


def test_the_example_is_a_whole_valid_configuration(tmp_path: Any) -> None:
    loaded = load(tmp_path, config.example())
    assert loaded["mqtt"]["tls"] is True
    assert loaded["mqtt"]["port"] == 8883


def test_the_example_explains_every_key_and_uncommented_it_still_loads(tmp_path: Any) -> None:
    text = config.example()
    for section, keys in KEYS.items():
        assert f"[{section}]" in text
        for name in keys:
            assert f"{name} = " in text
    lines = []
    for line in text.splitlines():
        bare = line.removeprefix("# ")
        is_key = any(bare.startswith(name + " = ") for keys in KEYS.values() for name in keys)
        lines.append(bare if is_key else line)
    assert config.check(tomllib.loads("\n".join(lines)))["report"]["heartbeat_windows"] == 60


def test_defaults_are_filled_in(tmp_path: Any) -> None:
    loaded = load(tmp_path, GOOD)
    assert loaded["collector"]["bpf"] == "auto"
    assert loaded["report"]["free_on"] == "ack"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[mqtt]", "[mqt]"), "is it mqtt?"),
        (("host =", "hots ="), "is it host?"),
        (('id = "pump-17"', ""), "[device] needs id"),
        (('id = "pump-17"', 'id = "a/b"'), "without / + #"),
        (('id = "pump-17"', "id = 17"), "must be a text"),
        (("[mqtt]", "[mqtt]\nport = 70000"), "from 1 to 65535"),
        (("[mqtt]", '[mqtt]\ntls = "no"'), "true or false"),
        (("[mqtt]", '[mqtt]\ntransport = "carrier pigeon"'), 'one of "auto", "lean", "paho"'),
        (("[mqtt]", "[mqtt]\nport = true"), "whole number"),
        (("[model]", "[collector]\ninterfaces = [1]\n[model]"), "list of texts"),
        (("[model]", "[counters]\nlist = [{name = 2024-01-01}]\n[model]"), "[counters] list must be"),
        (("[device]", "device = 3\n[devices]"), "section"),
        (("[device]", "[device"), "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Any, change: tuple[str, str], says: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD.replace(*change))
    assert says in str(caught.value)


def test_a_missing_file_and_bytes_that_are_no_text(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        config.load(str(tmp_path / "absent.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not TOML"):
        config.load(str(tmp_path / "binary.toml"))


LINES = {  # what replaces a line of GOOD; each must give one line that names the key
    "a number of 5,000 digits": ("[mqtt]", "[mqtt]\nport = " + "9" * 5000),
    "a hexadecimal number of 5,000 digits": ("[mqtt]", "[mqtt]\nport = 0x" + "f" * 5000),
    "5,000 brackets": ("[mqtt]", "[mqtt]\nx = " + "[" * 5000 + "]" * 5000),
    "900 brackets": ("[mqtt]", "[mqtt]\nport = " + "[" * 900 + "]" * 900),
    "3,000 dotted keys": ("[mqtt]", "[a" + ".a" * 3000 + "]\n[mqtt]"),
    "a section twice": ("[mqtt]", "[device]\n[mqtt]"),
    "a name of 100,000 characters": ("[mqtt]", "[mqtt]\n" + "k" * 100_000 + " = 1"),
    "a value of 100,000 characters": ("[mqtt]", '[mqtt]\nprefix = "' + "p" * 100_000 + '"'),
    "not a number": ("[mqtt]", "[mqtt]\nport = nan"),
    "a date": ("[mqtt]", "[mqtt]\nport = 1979-05-27"),
    "infinity": ("[mqtt]", "[mqtt]\nport = inf"),
    "a fraction": ("[mqtt]", "[report]\nbytes_per_day = 1e9\n[mqtt]"),
    "a table for a text": ("[mqtt]", '[mqtt]\nprefix = {a = "b"}'),
    "a list of tables for a section": ("[mqtt]", "[[log]]\n[mqtt]"),
    "NUL in the id": ('id = "pump-17"', 'id = "a\\u0000"'),
    "a blank in the id": ('id = "pump-17"', 'id = "a b"'),
    "an id that no topic may hold": ('id = "pump-17"', 'id = "é"'),
    "NUL in a path": ('key_file = "/etc', 'key_file = "/\\u0000etc'),
    "a line break in a path": ('key_file = "/etc', 'key_file = "/\\netc'),
    "NUL in the host": ('host = "broker.example.org"', 'host = "a\\u0000b"'),
    "a host of 300 characters": ('host = "broker.example.org"', 'host = "' + "a" * 300 + '"'),
    "a host with an empty part": ('host = "broker.example.org"', 'host = "a..b"'),
    "a host with a blank": ('host = "broker.example.org"', 'host = "a b"'),
    "NUL in the user": ("[mqtt]", '[collector]\nuser = "a\\u0000"\n[mqtt]'),
    "a user that is no number": ("[mqtt]", '[collector]\nuser = "²"\n[mqtt]'),
    "NUL in an interface": ("[mqtt]", '[collector]\ninterfaces = ["a\\u0000"]\n[mqtt]'),
    "NUL in a counter": ("[mqtt]", '[counters]\nlist = [{path = "/\\u0000"}]\n[mqtt]'),
    "a prefix with a wildcard": ("[mqtt]", '[mqtt]\nprefix = "a/+"'),
    "a prefix of the broker's own": ("[mqtt]", '[mqtt]\nprefix = "$SYS"'),
    "ALPN of 300 characters": ("[mqtt]", '[mqtt]\nalpn = "' + "x" * 300 + '"'),
    "a user name of 70,000 characters": ("[mqtt]", '[mqtt]\nusername = "' + "u" * 70_000 + '"'),
    "a firmware of 300 characters": ('id = "pump-17"', 'id = "x"\nfirmware = "' + "f" * 300 + '"'),
    "a file of 2 MB": ("[mqtt]", "# " + "x" * 2_000_000 + "\n[mqtt]"),
}


@pytest.mark.parametrize("change", LINES.values(), ids=LINES)
def test_any_bad_value_gives_one_short_line(tmp_path: Any, change: tuple[str, str]) -> None:
    assert change[0] in GOOD
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD.replace(*change))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600, text[:700]


@pytest.mark.parametrize(
    "data",
    [b"\0" * 100, b"\xff" * 100, GOOD.encode() + b"# \xe9", b"\xfe\xff" + GOOD.encode("utf-16-be")],
    ids=["NUL", "ones", "latin-1", "UTF-16"],
)
def test_bytes_that_are_no_configuration(tmp_path: Any, data: bytes) -> None:
    (tmp_path / "stonechat.toml").write_bytes(data)
    with pytest.raises(ConfigError, match="is not TOML"):
        config.load(str(tmp_path / "stonechat.toml"))


def test_a_byte_order_mark_and_line_ends_of_windows_are_no_trouble(tmp_path: Any) -> None:
    (tmp_path / "stonechat.toml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert config.load(str(tmp_path / "stonechat.toml"))["device"]["id"] == "pump-17"


def test_a_fifo_or_a_device_in_place_of_a_file_is_no_wait(tmp_path: Any) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (str(tmp_path / "fifo"), "/dev/zero", str(tmp_path), "/\0"):
        with pytest.raises(ConfigError):
            config.load(path)
        with pytest.raises(ConfigError):
            files.read_secret(path, "[mqtt] password_file")
        with pytest.raises(ConfigError):
            files.read_file(path, "[model] file")


@pytest.mark.parametrize("user", ["99999999999999999999", "no-such-user", "0", "root"])
def test_users_that_can_not_be(user: str) -> None:
    with pytest.raises(ConfigError):
        privileges.user_ids(user)
