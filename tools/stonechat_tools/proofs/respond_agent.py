"""The part of the agent that responds, in a process that chaos may kill: the lease, the Linux enforcer and the
allow-list are the agent's own; the alarms come from standard input, the renewals from the broker's address over the
network.

    python -m stonechat_tools.proofs.respond_agent FOLDER FRAMES     in the device's namespace

FOLDER has etc/resolv.conf; FRAMES: 1, or 0 for a kernel without the egress chain. Reads lines: `alarm ACTION SECONDS`,
`level N`, `wall SECONDS` and `suspended SECONDS` (jumps of the clocks), `close`. Prints lines: WORD and a time of
CLOCK_MONOTONIC in seconds.
"""

import os
import select
import socket
import sys
import time

from stonechat.compat import ticks_ms
from stonechat.errors import StonechatError
from stonechat.lease import Lease
from stonechat.linux import allow_list, netfilter
from stonechat.policy import OBSERVE

BROKER, BROKER_PORT = "10.88.0.1", 1883
OPERATOR = "10.88.0.5"
TURN_S = 0.05
_LONGEST_S = 600


def say(*words: object) -> None:
    print(*words, f"{time.monotonic():.6f}", flush=True)


class Agent:
    def __init__(self, folder: str, frames: bool) -> None:
        self.ahead_ms = 0
        for module in (allow_list, netfilter):
            module.ticks_ms = self.now_ms  # type: ignore[attr-defined]
        rows = [{"address": OPERATOR, "reason": "operator"}]
        allow = allow_list.AllowList(BROKER, BROKER_PORT, rows, root=folder)
        self.response = netfilter.Netfilter(allow, frames)
        self.lease = Lease(self.response)
        self.level = 0
        self.broker: socket.socket | None = None
        self.number = 0
        say("started")

    def now_ms(self) -> int:
        return ticks_ms() + self.ahead_ms

    def alarm(self, action: int, seconds: int) -> None:
        self.level = 2
        say("applying")
        try:
            self.lease.begin(0, action, seconds, self.now_ms() // 1000)
            say("applied")
        except (StonechatError, OSError) as error:
            say("refused", str(error).replace(" ", "_"))

    def renew(self) -> None:
        self.number += 1
        say("renewing")
        try:
            self.lease.renew(self.lease.number, self.number, self.now_ms() // 1000, self.level)
            say("renewed")
        except (StonechatError, OSError) as error:
            say("refused", str(error).replace(" ", "_"))

    def obey(self, line: str) -> bool:
        word, *rest = line.split()
        if word == "alarm":
            self.alarm(int(rest[0]), int(rest[1]))
        elif word == "level":
            self.level = int(rest[0])
        elif word == "wall":
            ahead_s = int(rest[0])
            allow_list.epoch_s = lambda: int(time.time()) + ahead_s  # type: ignore[attr-defined]
        elif word == "suspended":
            self.ahead_ms += 1000 * int(rest[0])
        elif word == "release":
            self.end()
        return word != "close"

    def end(self) -> None:
        self.lease.end(self.now_ms() // 1000)
        say("ended")

    def turn(self) -> None:
        trouble = self.response.turn()
        if trouble:
            say("trouble", trouble.replace(" ", "_"))
            self.end()
        elif self.lease.turn(self.now_ms() // 1000):
            say("ended")
        elif self.lease.action == OBSERVE:
            self.lease.pause_until_s = 0  # in a few seconds there is no time for pauses

    def talk(self) -> None:
        """Stay connected to the broker, as an MQTT client does; each byte from there is a renewal."""
        if self.broker is None:
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex((BROKER, BROKER_PORT))
            self.broker = sock
            return
        try:
            data = self.broker.recv(16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.broker.close()
            self.broker = None
        for _ in data:
            self.renew()


def main(folder: str, frames: bool) -> int:
    agent = Agent(folder, frames)
    rest = b""
    deadline_s = time.monotonic() + _LONGEST_S
    while time.monotonic() < deadline_s:
        if select.select([0], [], [], TURN_S)[0]:
            data = os.read(0, 4096)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            if not all(agent.obey(line.decode()) for line in lines):
                break
        agent.turn()
        agent.talk()
    agent.end()
    agent.response.close()
    say("closed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2] == "1"))
