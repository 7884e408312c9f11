"""What waits between the connections to the brokers and the database."""

import threading
from collections import deque

from .mqtt_codec import Message

MAX_BATCH = 2000
MAX_WAITING = 8000  # messages between the connection and the database; the broker keeps the others,
MAX_WAITING_BYTES = 4_000_000  # with all that they take in memory
MESSAGE_BYTES = 450  # of memory for a message, beside its payload
BATCH_LEAST = 200  # with this many a batch does not wait for more

Source = tuple[int, int]  # which broker, and the number of the connection to it


class Waiting:
    """Messages on their way to the database, bounded by number and by bytes. Each with the connection that brought
    it."""

    def __init__(self) -> None:
        self._parts: deque[tuple[Source, list[Message], int]] = deque()
        self._count = self._bytes = 0
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return self._count

    def has_space(self, share: int = 1) -> bool:
        return self._count * share < MAX_WAITING and self._bytes * share < MAX_WAITING_BYTES

    def wait_space(self, wait_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(self.has_space, wait_s)

    def put(self, source: Source, messages: list[Message]) -> None:
        size = sum(len(message.payload) for message in messages) + MESSAGE_BYTES * len(messages)
        with self._changed:
            self._parts.append((source, messages, size))
            self._count += len(messages)
            self._bytes += size
            self._changed.notify_all()

    def take(self, first_s: float, more_s: float) -> tuple[Source | None, list[Message]]:
        """Up to MAX_BATCH messages of one connection: the first within first_s, the others within more_s of it."""
        found: list[Message] = []
        with self._changed:
            self._changed.wait_for(lambda: self._parts, first_s)
            if not self._parts:
                return None, found
            if self._count < BATCH_LEAST:
                self._changed.wait_for(lambda: self._count >= BATCH_LEAST, more_s)
            source = self._parts[0][0]
            while self._parts and self._parts[0][0] == source and len(found) < MAX_BATCH:
                _, messages, size = self._parts.popleft()
                space = MAX_BATCH - len(found)
                if len(messages) > space:
                    left = messages[space:]
                    left_size = size * len(left) // len(messages)
                    self._parts.appendleft((source, left, left_size))
                    messages, size = messages[:space], size - left_size
                found += messages
                self._count -= len(messages)
                self._bytes -= size
            self._changed.notify_all()
        return source, found
