"""What a collector remembers between batches of each device and each of its starts: columns of numbers, no objects.

A device has a place in the columns of devices, a start (a stream) one in those of streams. Of 100,000 devices that
takes a third of the memory that an object each would, and a batch makes and drops none. NONE is for what is not known.
"""

from array import array

NONE = -(1 << 63)


class Known:
    """`places`: where each device is, by its name. A device's columns: `device`, its row in the database; `key`, see
    key_number(); `newest_s`, the time of its newest event; `heartbeat`; `stream`, the place of its current stream, -1
    for none; `stream_name`, that stream's name as a number. A stream's: `row`, in the database; `highest` of its
    sequence numbers, -1 for none; `forgotten`, the highest that was deleted; `began_s`; `behind_s`."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self.device, self.newest_s, self.heartbeat = array("q"), array("q"), array("q")
        self.key, self.stream_name = array("Q"), array("Q")
        self.stream = array("i")
        self.row, self.highest, self.forgotten = array("q"), array("q"), array("q")
        self.began_s, self.behind_s = array("q"), array("q")
        self._free: list[int] = []  # places of streams that were dropped

    def add(self, name: str, device: int, key: str, newest_s: int | None, heartbeat: int) -> None:
        self.places[name] = len(self.device)
        self.device.append(device)
        self.key.append(key_number(key))
        self.newest_s.append(NONE if newest_s is None else newest_s)
        self.heartbeat.append(heartbeat)
        self.stream.append(-1)
        self.stream_name.append(0)

    def add_stream(self, row: int, highest: int, forgotten: int, began_s: int | None, behind_s: int | None) -> int:
        """-> its place."""
        columns = (self.row, self.highest, self.forgotten, self.began_s, self.behind_s)
        if not self._free:
            self._free.append(len(self.row))
            for column in columns:
                column.append(0)
        at = self._free.pop()
        values = (row, highest, forgotten, NONE if began_s is None else began_s, NONE if behind_s is None else behind_s)
        for column, value in zip(columns, values, strict=True):
            column[at] = value
        return at

    def drop_stream(self, at: int) -> None:
        self.row[at] = -1
        self._free.append(at)

    def forget(self, rows: dict[int, int]) -> None:
        """rows: of streams that have lost reports, and the highest number that each has."""
        for at, row in enumerate(self.row):
            if row in rows:
                self.forgotten[at] = max(self.forgotten[at], rows[row])


def key_number(key: str) -> int:
    """The fingerprint of a key as a number; 0 for none, and for a text that is none."""
    try:
        return int(key, 16) & 0xFFFF_FFFF_FFFF_FFFF if key else 0
    except ValueError:
        return 0
