"""A vendor's own counters for the tools: a TOML file that names them and the files that the firmware writes.

    schema = "door-lock-1"

    [[counters]]
    name = "openings"             # at most 32 bytes, no comma
    unit = "openings"
    kind = "rate"                 # rate: only grows, the window takes the difference; level: a reading; share: percent
    path = "/run/lock/openings"   # a file with one whole number

The same [[counters]] are in the agent's configuration; on a board, the firmware passes the numbers to
`custom_counters.CounterCollector(schema, read)` instead.
"""

import os

from stonechat.custom_counters import CounterCollector, from_config
from stonechat.errors import ConfigError

from ..console import read_toml


def load_counters(path: str | os.PathLike[str]) -> CounterCollector:
    """The collector of a counters file. Raises ConfigError (FILE: what is wrong) or OSError."""
    table = read_toml(path)
    name = table.get("schema")
    rows = table.get("counters")
    if not isinstance(name, str) or not name or any(letter.isspace() for letter in name):
        raise ConfigError(f"{path}: schema must name the schema, without white space")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: it needs at least one [[counters]]")
    try:
        return from_config(name, rows)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
