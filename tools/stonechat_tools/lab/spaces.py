"""Network namespaces without a name: each belongs to a thread of this process, and the kernel removes it with the
process, however that ends.

with pair() as net:
    sock = net.device.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)   # usable from any thread
    net.device.do(subprocess.run, ["ip", "addr"])                            # programs run inside, too
"""

import contextlib
import ctypes
import os
import queue
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from stonechat.errors import ConfigError

T = TypeVar("T")
GATEWAY, DEVICE = "10.99.0.1", "10.99.0.2"
GATEWAY6, DEVICE6 = "fd99::1", "fd99::2"
NETWORK = "10.88.0.0/16"  # the outside answers at all of these,
NETWORK6 = ("fd88::1", "fd88::5", "fd88::77")  # and at these
INTERFACE = "eth0"
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET


class Space:
    """A network namespace of its own. Raises ConfigError where this process may not make one."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], Any] | None] = queue.SimpleQueue()
        made: Future[int] = Future()
        self._thread = threading.Thread(target=self._serve, args=(made,), daemon=True, name="namespace")
        self._thread.start()
        self.fd = made.result()
        self.ip("link set lo up")

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def do(self, work: Callable[..., T], *arguments: Any) -> T:
        """work(*arguments) inside -> what it returns or raises."""
        done: Future[T] = Future()
        self._jobs.put((done, work, arguments))
        return done.result()

    def ip(self, *lines: str) -> None:
        """Lines for `ip -batch`. Raises ConfigError."""
        words = ["ip", "-batch", "-"]

        def run() -> None:
            try:
                subprocess.run(words, input="\n".join(lines), check=True, capture_output=True, text=True, timeout=60)
            except FileNotFoundError:
                raise ConfigError("network namespaces need ip (apt-get install iproute2)") from None
            except subprocess.CalledProcessError as error:
                raise ConfigError(f"ip {'; '.join(lines)}: {error.stderr.strip()}") from None

        self.do(run)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(10)
        os.close(self.fd)

    def _serve(self, made: "Future[int]") -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_NEW_NETWORK) != 0:
            made.set_exception(ConfigError(f"network namespaces need root: {os.strerror(ctypes.get_errno())}"))
            return
        made.set_result(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        while (job := self._jobs.get()) is not None:
            done, work, arguments = job
            try:
                done.set_result(work(*arguments))
            except BaseException as error:  # noqa: BLE001 - whoever waits for it gets it
                done.set_exception(error)


@dataclass(frozen=True)
class Pair:
    """A device and all that is outside, joined by a veth pair; the device's default gateway is GATEWAY."""

    device: Space
    outside: Space


@contextlib.contextmanager
def pair() -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        spaces = []
        for _ in range(2):
            spaces.append(Space())
            stack.callback(spaces[-1].close)
        device, outside = spaces
        join(device, outside)
        yield Pair(device, outside)


def join(device: Space, outside: Space) -> None:
    outside.ip(
        f"link add {INTERFACE} type veth peer name {INTERFACE} netns {device.path}",
        f"addr replace {GATEWAY}/24 dev {INTERFACE}",
        f"addr add {GATEWAY6}/64 dev {INTERFACE} nodad",
        f"link set {INTERFACE} up",
        f"route replace local {NETWORK} dev lo",
        *[f"addr replace {address}/128 dev lo nodad" for address in NETWORK6],
    )
    device.ip(
        f"addr add {DEVICE}/24 dev {INTERFACE}",
        f"addr add {DEVICE6}/64 dev {INTERFACE} nodad",
        f"link set {INTERFACE} up",
        f"route add default via {GATEWAY}",
        f"route add ::/0 via {GATEWAY6}",
    )
