"""In-memory outbox with the interface of outbox.Outbox, for devices without a file system."""

from .compat import urandom


class MemoryOutbox:
    """A bounded queue in RAM. `stream` names this start's reports; `sequence` is the next report's number, `oldest` the
    first one not acknowledged, `lost` counts what was dropped; `boot` is 1: it can't count its starts."""

    def __init__(self, max_bytes: int = 2048, sequence: int = 1) -> None:
        self.max_bytes = max_bytes
        self.stream = urandom(4)
        self.sequence = sequence
        self.oldest = sequence
        self.boot = 1
        self.lost = 0
        self._records: list = []
        self._bytes = 0

    def append(self, body) -> int:
        """Hold `body` as number `sequence`, which is returned; the oldest are dropped where space is short."""
        self._bytes += len(body)
        self._records.append((self.sequence, bytes(body)))
        self.sequence += 1
        while self._bytes > self.max_bytes and len(self._records) > 1:
            self._bytes -= len(self._records.pop(0)[1])
            self.lost += 1
        self._forward()
        return self.sequence - 1

    def after(self, sequence: int):
        """The first record behind `sequence` as (sequence, body), or None."""
        for record in self._records:
            if record[0] > sequence:
                return record
        return None

    def ack(self, first: int, last: int, stream: bytes) -> int:
        """Free first..last of `stream`, both included -> how many of them were still held."""
        if stream != self.stream:
            return 0
        count = len(self._records)
        self._records = [record for record in self._records if not first <= record[0] <= last]
        self._bytes = sum([len(record[1]) for record in self._records])
        self._forward()
        return count - len(self._records)

    def _forward(self) -> None:
        self.oldest = self._records[0][0] if self._records else self.sequence

    def save(self) -> None:
        pass
