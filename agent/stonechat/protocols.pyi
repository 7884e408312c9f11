"""What the agent expects of the parts that it is given. For type checkers and readers: nothing imports it at run time,
and tools/tests/test_protocols.py holds every class of the package to it."""

from collections.abc import Callable
from typing import Any, Protocol

class Schema(Protocol):
    """The columns that a collector fills; `id` is eight bytes, the start of the SHA-256 of the columns."""

    id: bytes
    kinds: tuple[str, ...]  # features.RATE, LEVEL or SHARE for each column

    def __len__(self) -> int: ...

class Collector(Protocol):
    """Reads the counters. Raises CollectorError or OSError where it can't; the next window is another attempt."""

    schema: Schema
    sources: tuple[tuple[str, str, str], ...]  # (group, source, note) of each source that works

    def read(self, values: list[int]) -> None:
        """Fill `values`, len(schema) integers: a RATE is cumulative, a LEVEL a reading, a SHARE percent in Q8."""

    def close(self) -> None: ...

class PeerCollector(Collector, Protocol):
    """A collector that learns the device's peers. It may have `warmup_windows`, to pass before anything is learned, and
    `lacks`, a text of what it can't read at present; `contacts`, after read(): the peers that the device itself called
    in the window, as integers below 2^30, or None where it knows none; `sent`: the bytes sent to each of them, or
    None; and `most_peers`, how many to remember."""

    def dump(self) -> bytes:
        """What the state keeps."""

    def restore(self, packed: bytes) -> Any:
        """packed: what dump() gave."""

    def hold_peers(self, hold: bool) -> None:
        """hold: under suspicion no peer becomes known."""

class Model(Protocol):
    """Runs a network; what model.load_model gives."""

    input_size: int  # bytes
    output_size: int
    macs: int  # multiply-accumulates of a run
    digest: bytes  # the first 8 bytes of the file's SHA-256
    metadata: Any  # metadata.Metadata, or None where the file carries none

    def run(self, x: Any) -> Any:
        """x: int8 bytes -> int8 bytes, the same buffer each time."""

class Outbox(Protocol):
    """Keeps reports until they are acknowledged. Numbers rise by one; (stream, number) names a report for ever."""

    stream: bytes  # 4 bytes, drawn at random at each start
    sequence: int  # number of the next report
    oldest: int  # the first number that is not acknowledged
    boot: int
    lost: int  # reports that a full outbox has dropped

    def append(self, body: bytes) -> int:
        """Keep `body` as number `sequence`, which is returned. Raises OutboxError; the number is used up then."""

    def after(self, sequence: int) -> tuple[int, bytes] | None:
        """The first record behind `sequence` that is not acknowledged."""

    def ack(self, first: int, last: int, stream: bytes) -> int:
        """Free first..last of `stream`, both included -> how many of them were held."""

    def save(self) -> None:
        """Before an orderly stop."""

class Transport(Protocol):
    """An MQTT client, as Agent.connect() takes it. All calls come from one thread, and the callbacks from poll()."""

    connected: bool
    will: tuple[str, bytes, int, bool] | None  # topic, payload, qos, retain: to be used from the next connection on
    resend: bool  # send again after a reconnect what the broker had not acknowledged
    on_connect: Callable[[], None] | None
    on_message: Callable[[str, bytes], None] | None
    on_published: Callable[[Any], None] | None  # with the handle that publish() returned, once it is acknowledged

    def publish(self, topic: str, payload: bytes, qos: int = 0, retain: bool = False) -> Any:
        """With QoS 1 -> a handle for on_published; None says that the broker has it already. Raises OSError or
        MQTTError, and has not taken it, where that can't be done now."""

    def subscribe(self, topic: str, qos: int = 1) -> None:
        """Holds for every later connection too."""

    def poll(self, wait_s: float = 0) -> None:
        """Move what can be moved, waiting at most wait_s; reconnect when that is due. Raises OSError or MQTTError once
        when the connection is lost."""

    def close(self) -> None: ...

class Enforcer(Protocol):
    """Acts on the network for a lease (lease.py). What the operator has allowed passes whatever is in force."""

    def apply(self, action: int, seconds: int) -> None:
        """action: policy.THROTTLE or policy.QUARANTINE; it replaces what is in force, in one step, and ends by itself
        after `seconds`, even if this process is gone. Raises OSError: then nothing is in force."""

    def extend(self, seconds: int) -> None:
        """What is in force lasts `seconds` from now on. Raises OSError; the end stays as it was."""

    def release(self) -> None:
        """End it at once; nothing happens where nothing is in force. Raises OSError."""

    def counts(self) -> tuple[int, int]:
        """Packets (on boards: calls) of what is not allowed that passed and that were stopped since apply(). Raises
        OSError."""

    def essential(self) -> bool:
        """Whether the flows that the device needs, as it has learned them, still live."""

    def close(self) -> None:
        """End it and take away all that was set up."""

class State(Protocol):
    """Keeps what was learned, section by section."""

    sections: dict[bytes, bytes]

    def get(self, section: bytes, default: Any = None) -> Any: ...
    def put(self, section: bytes, value: bytes) -> None: ...
    def save(self) -> None:
        """Write down what was put. Raises StateError where the medium refuses."""
