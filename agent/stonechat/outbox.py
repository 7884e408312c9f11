"""Store and forward: reports wait here until a collector acknowledges that it has committed them.

A ring of segment files, 512 bytes each, on littlefs and ext4 alike; survives power cuts. (outbox_memory.py: the same in
RAM.) A segment is a run of records: '<HII' length, sequence number, CRC-32 of both and of the body; then the body. The
first record of a segment is a mark (top bit of the length set; body '<II4s' boot, oldest sequence number not
acknowledged, stream; its sequence number is the next report's), so the newest segment alone says how far the device
is. Every start draws a stream at random and begins a new segment: nothing is ever written behind a torn tail, and a
number that comes again, because the medium was erased or restored, is that of another report. What is full drops its
oldest.
"""

import os
from binascii import crc32
from struct import pack_into, unpack_from

from .compat import const, sync_file, urandom, write_atomic
from .errors import OutboxError

_SEGMENT_BYTES = const(512)
_HEADER_BYTES = const(10)
_MARK_BYTES = const(22)
_MARK = const(0x8000)
_CLOSED = const(_SEGMENT_BYTES + 1)  # where the next record would go, while no segment is open
_AHEAD = const(30)  # acknowledgements out of order are held for this many numbers, in one small int


class Outbox:
    """path: a folder of its own; max_bytes: what the ring may take. Raises OutboxError where it can't be opened or
    written. `stream` names this start's reports, `boot` counts the starts, `damaged` the records that a torn write or a
    bad medium has cost."""

    def __init__(self, path: str, max_bytes: int = 32_768) -> None:
        if max_bytes < 2 * _SEGMENT_BYTES:
            raise OutboxError("outbox: max_bytes is %d, at least %d" % (max_bytes, 2 * _SEGMENT_BYTES))
        self.path = path
        self.max_segments = max_bytes // _SEGMENT_BYTES
        self.stream = urandom(4)
        self.sequence = 1
        self.oldest = 1
        self.boot = 0
        self.lost = 0
        self.damaged = 0
        self._ahead = 0  # bit i: number oldest + i is acknowledged
        self._segments: list = []  # [file number, first sequence number or 0, last one, stream]
        self._cached = 0  # file number of the segment that _cache holds
        self._cache = b""
        self._latest = (0, b"")
        self._head = bytearray(_HEADER_BYTES)  # of a record; the same each time, so that a report costs no new one
        self._head_summed = memoryview(self._head)[:6]
        self._at = _CLOSED
        try:
            self._open()
        except OSError as error:
            raise OutboxError("outbox: can't use %s: %s" % (path, error))

    def _open(self) -> None:
        try:
            os.mkdir(self.path)
        except OSError:
            pass  # it is there, or listdir says what is wrong
        for name in self._names():
            segment = [int(name[:8], 16), 0, 0, None]
            self._scan(segment)
            self._segments.append(segment)
        self.boot += 1
        self._forward()
        self._new_segment()

    def _names(self) -> list:
        return sorted([name for name in os.listdir(self.path) if name.endswith(".seg")])

    def _name(self, number: int) -> str:
        return "%s/%08x.seg" % (self.path, number)

    def _read(self, number: int) -> bytes:
        """The segment's bytes; none where the medium can't give them."""
        if self._cached != number:
            self._cache = b""
            try:
                with open(self._name(number), "rb") as file:
                    self._cache = file.read(_SEGMENT_BYTES + 1)
            except OSError:
                self.damaged += 1
            self._cached = number
        return self._cache

    def _scan(self, segment: list) -> None:
        data = self._read(segment[0])
        at = 0
        while at < len(data):
            length, sequence = _check(data, at)
            if length < 0:
                self.damaged += 1
                return
            if length & _MARK:
                boot, oldest, segment[3] = unpack_from("<II4s", data, at + _HEADER_BYTES)
                self.boot = max(self.boot, boot)
                self.oldest = max(self.oldest, oldest)
                self.sequence = max(self.sequence, sequence)
            else:
                segment[1] = segment[1] or sequence
                segment[2] = sequence
                self.sequence = max(self.sequence, sequence + 1)
            at += _HEADER_BYTES + (length & ~_MARK)

    def _mark(self) -> bytearray:
        mark = bytearray(_MARK_BYTES)
        pack_into("<II4s", mark, _HEADER_BYTES, self.boot, self.oldest, self.stream)
        self._begin(_MARK | 12, self.sequence, memoryview(mark)[_HEADER_BYTES:])
        mark[:_HEADER_BYTES] = self._head
        return mark

    def _begin(self, length: int, sequence: int, body) -> None:
        """Fill _head for the record of `body`."""
        pack_into("<HI", self._head, 0, length, sequence)
        crc = crc32(body, crc32(self._head_summed))
        pack_into("<I", self._head, 6, crc)

    def _new_segment(self) -> None:
        number = self._next_number()
        self._close()
        self._trim()
        name = self._name(number)
        write_atomic(name, (self._mark(),))
        self._segments.append([number, 0, 0, self.stream])
        self._file = open(name, "ab")
        self._at = _MARK_BYTES

    def _next_number(self) -> int:
        return (self._segments[-1][0] if self._segments else 0) + 1

    def _close(self) -> None:
        if self._at != _CLOSED:
            self._at = _CLOSED
            self._file.close()

    def _trim(self) -> None:
        """Remove segments that hold nothing of use; the newest stays until the next has its mark on the medium."""
        keep = []
        last = len(self._segments) - 1
        for i, segment in enumerate(self._segments):
            used = segment[2] >= self.oldest
            if i == last or (used and last - i < self.max_segments - 1):
                keep.append(segment)
                continue
            if used:
                self.lost += segment[2] - max(segment[1], self.oldest) + 1
            try:
                os.remove(self._name(segment[0]))
            except OSError:
                pass  # it is no longer ours; the next start tries again
        self._segments = keep
        self._forward()

    def append(self, body) -> int:
        """Write `body` down as number `sequence`, which is returned once it is on the medium. Raises OutboxError where
        the medium refuses; the number is used up then, and the report may go out under it from elsewhere."""
        if _MARK_BYTES + _HEADER_BYTES + len(body) > _SEGMENT_BYTES:
            raise OutboxError("outbox: a report of %d bytes" % len(body))
        sequence = self.sequence
        size = _HEADER_BYTES + len(body)
        try:
            if self._at + size > _SEGMENT_BYTES:
                self._new_segment()  # before the number counts as used: all that is acknowledged ends below it
            self.sequence = sequence + 1
            self._begin(len(body), sequence, body)
            self._file.write(self._head)
            self._file.write(body)
            sync_file(self._file)
        except OSError as error:
            self.sequence = sequence + 1
            try:
                self._close()  # its tail may be torn: the next report begins a new segment
            except OSError:
                pass
            raise OutboxError("outbox: can't write %s: %s" % (self.path, error))
        self._at += size
        segment = self._segments[-1]
        segment[1] = segment[1] or sequence
        segment[2] = sequence
        self._latest = (sequence, body)
        if self._cached == segment[0]:
            self._cached = 0
        return sequence

    def after(self, sequence: int):
        """The first record behind `sequence` that is not acknowledged, as (sequence, body), or None."""
        sequence = max(sequence, self.oldest - 1)
        if sequence + 1 == self._latest[0]:
            return None if self._is_ahead(sequence + 1) else self._latest
        for record in self._segments:
            if record[2] > sequence:
                record = self._search(record, sequence)  # noqa: PLW2901 - with one variable more a call takes memory
                if record is not None:
                    return record
        return None

    def _search(self, segment: list, sequence: int):
        data = self._read(segment[0])
        at = last = 0
        while at < len(data):
            length, found = _check(data, at)
            if length < 0:
                break
            start = at + _HEADER_BYTES
            at = start + (length & ~_MARK)
            if not length & _MARK:
                last = found
                if found > sequence and not self._is_ahead(found):
                    return found, data[start:at]
        if last < segment[2]:  # the medium has gone bad since it was written: what can't be read must not hold the rest
            self.damaged += 1
            self.lost += segment[2] - max(last, segment[1] - 1, self.oldest - 1)
            segment[2] = last
            self._forward()
        return None

    def _is_ahead(self, sequence: int) -> bool:
        bit = sequence - self.oldest  # below 0 where a bad segment moved `oldest` on during a search
        return bit < 0 or bit < _AHEAD and bool(self._ahead >> bit & 1)

    def ack(self, first: int, last: int, stream: bytes) -> int:
        """Free first..last of `stream`, both included -> how many of them were still held."""
        freed = 0
        for segment in self._segments:
            if segment[3] == stream:
                self._forward()
                number = max(first, segment[1], self.oldest)
                while number <= last and number <= segment[2]:  # range() holds small ints only, on 32 bit
                    freed += self._free(number)
                    number += 1
        self._forward()
        return freed

    def _free(self, number: int) -> bool:
        bit = number - self.oldest
        held = bit < _AHEAD and not self._ahead >> bit & 1
        if not bit:
            self._advance(number + 1)
        elif held:
            self._ahead |= 1 << bit
        return held

    def _advance(self, oldest: int) -> None:
        self._ahead >>= min(_AHEAD, oldest - self.oldest)
        self.oldest = oldest

    def _forward(self) -> None:
        """Move `oldest` to the first record that is there and not acknowledged, or to `sequence`."""
        for segment in self._segments:
            if segment[2] < self.oldest:
                continue
            if segment[1] > self.oldest:
                self._advance(segment[1])
            while self._ahead & 1:
                self._advance(self.oldest + 1)
            if segment[2] >= self.oldest:
                return
        self._advance(self.sequence)

    def save(self) -> None:
        """Write down what is acknowledged: before a deep sleep or an orderly stop. Costs one record; without it a start
        sends up to a segment again, which the collector drops."""
        if self._at + _MARK_BYTES > _SEGMENT_BYTES:
            return
        try:
            self._file.write(self._mark())
            sync_file(self._file)
            self._at += _MARK_BYTES
        except OSError as error:
            raise OutboxError("outbox: can't write %s: %s" % (self.path, error))


def _check(data: bytes, at: int) -> tuple:
    """(length with the mark's bit, sequence number) of the record at `at`; length -1 where there is none."""
    if at + _HEADER_BYTES > len(data):
        return -1, 0
    length, sequence, crc = unpack_from("<HII", data, at)
    end = at + _HEADER_BYTES + (length & ~_MARK)
    if end > len(data) or (length & ~_MARK) == 0 or length & _MARK and length != _MARK | 12:
        return -1, 0
    body = data[at + _HEADER_BYTES : end]
    if crc32(body, crc32(data[at : at + 6])) != crc:
        return -1, 0
    return length, sequence
