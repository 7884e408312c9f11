"""A vendor's own counters, which only this product has, as a collector with a schema of its own.

    doors = counter_schema("door-lock-1", (
        ("openings", "openings", RATE),         # counts since power-on; the window takes the difference
        ("wrong_codes", "attempts", RATE),
        ("battery", "%", SHARE),                # a reading in percent, 0 to 100
    ))
    collector = CounterCollector(doors, lambda: (lock.openings, lock.wrong_codes, lock.battery_percent))

They are recorded, trained, scored and explained like the built-in ones, with a model of their own beside the device's
reference model; the agent fuses the two at the evidence (`fuse`).
"""

from .compat import const
from .errors import CollectorError, ConfigError
from .features import LEVEL, RATE, SHARE
from .schema import Schema

MAX_COUNTERS = const(64)
_MAX_NAME_BYTES = const(32)
_FULL_SHARE_Q8 = const(25600)
_FILE_BYTES = const(32)


def counter_schema(name: str, counters) -> Schema:
    """name of the schema; counters: (name, unit, kind) each, kind one of RATE, LEVEL, SHARE -> Schema. Its id follows
    from the counters alone. Raises ConfigError, naming the counter."""
    counters = tuple([tuple(counter) for counter in counters])
    if not 0 < len(counters) <= MAX_COUNTERS:
        raise ConfigError("counters: %d of them, want 1 to %d" % (len(counters), MAX_COUNTERS))
    seen = set()
    for counter in counters:
        if len(counter) != 3 or not all([isinstance(part, str) for part in counter]):
            raise ConfigError("counters: want (name, unit, kind), got %r" % (counter,))
        word, _, kind = counter
        if not 0 < len(word.encode()) <= _MAX_NAME_BYTES or any([c in ',"#\r\n' for c in word]) or word in seen:
            raise ConfigError("counters: the name %r is empty, too long, taken, or has a comma, quote or #" % word)
        if kind not in (RATE, LEVEL, SHARE):
            raise ConfigError("counters: %s has kind %r, want rate, level or share" % (word, kind))
        seen.add(word)
    return Schema(name, counters)


class CounterCollector:
    """schema: from counter_schema; read: called once a window without arguments, gives one number per column: what a
    RATE has counted up to now (never falling but at a restart), what a LEVEL reads, a SHARE in percent."""

    def __init__(self, schema, read) -> None:
        self.schema = schema
        self.lacks = ""  # why they can't be read at present
        self._read = read
        self._share = [kind == SHARE for kind in schema.kinds]

    @property
    def sources(self):
        return (("lacks" if self.lacks else "counters", self.schema.name[:24], self.lacks),)

    def read(self, values) -> None:
        """Fill `values`. Raises CollectorError for a wrong number of counters or a value that is not a count, and
        whatever OSError the vendor's function raises."""
        self.lacks = self.lacks or "counters " + self.schema.name  # until all are read
        self._fill(values)
        self.lacks = ""

    def _fill(self, values):
        got = self._read()
        if len(got) != len(self._share):
            raise CollectorError("%s: %d counters, want %d" % (self.schema.name, len(got), len(self._share)))
        for i, is_share in enumerate(self._share):
            try:
                value = int(got[i] * 256) if is_share else int(got[i])
            except (TypeError, ValueError, OverflowError):
                raise CollectorError("%s: %s is %r, not a number" % (self.schema.name, self._name(i), got[i]))
            if value < 0 or is_share and value > _FULL_SHARE_Q8:
                raise CollectorError("%s: %s is %r, out of range" % (self.schema.name, self._name(i), got[i]))
            values[i] = value

    def close(self) -> None:
        pass

    def _name(self, i):
        return self.schema.columns[i][0]


class FileCounters:
    """What a firmware writes to small files (one number each, as under /sys or /run), as CounterCollector's `read`."""

    def __init__(self, paths) -> None:
        self._paths = tuple(paths)
        self._numbers = [0] * len(self._paths)

    def __call__(self):
        """-> one whole number per file. Raises OSError or CollectorError, naming the file."""
        for i, path in enumerate(self._paths):
            text = self._text(path)
            try:
                self._numbers[i] = int(text)
            except ValueError:
                raise CollectorError("%s does not hold one whole number: %r" % (path, text))
        return self._numbers

    def _text(self, path):
        with open(path, "rb") as file:
            return file.read(_FILE_BYTES)


def from_config(name: str, rows, files=FileCounters) -> "CounterCollector":
    """name of the schema; rows: what a configuration's [[counters]] gave: mappings with name, unit, kind and path ->
    CounterCollector over FileCounters. Raises ConfigError."""
    for row in rows:
        for key in ("name", "unit", "kind", "path"):
            if not isinstance(row.get(key), str) or not row[key]:
                raise ConfigError("counters: each needs %s, a text; got %r" % (key, row.get(key)))
        for key in row:
            if key not in ("name", "unit", "kind", "path"):
                raise ConfigError("counters: unknown key %r (there are name, unit, kind, path)" % key)
    schema = counter_schema(name, [(row["name"], row["unit"], row["kind"]) for row in rows])
    return CounterCollector(schema, files([row["path"] for row in rows]))
