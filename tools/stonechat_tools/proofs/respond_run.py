"""One chaos run: the agent as a process that may be killed, what goes wrong, and the judgement."""

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from typing import Any, ClassVar

from stonechat.errors import ConfigError
from stonechat.linux import netfilter_rules, nfnetlink
from stonechat.policy import QUARANTINE, THROTTLE

from ..lab import spaces
from .respond_traffic import DNS, DNS6, FOLLOWS_WITHIN_S, NEW_DNS, Traffic

SLACK_S = 0.1  # between the kernel's clock tick and ours


class Run(Traffic):
    PACE = 1.0
    CHANCES: ClassVar[dict[str, int]] = {
        "alarm": 8, "renew": 8, "kill_agent": 2, "start_agent": 3, "kill_collector": 1, "broker_away": 1,
        "broker_back": 1, "wall_clock_jumps": 1, "suspended": 1, "evidence_gone": 1, "release": 1,
        "allow_list_changed": 1, "address_changed": 1, "reboot": 1, "tables_deleted": 1, "rules_flushed": 1,
    }  # fmt: skip

    def __init__(self, seed: int, t1_s: int) -> None:
        self.rng = random.Random(seed)
        self.t1_s = t1_s
        self.no_egress = self.rng.random() < 0.15
        super().__init__(seed, same_address=self.rng.random() < 0.3)
        self.agent: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()
        self.may_stop: list[list[float]] = []  # [from, until]: when others may be stopped
        self.pending_s: float | None = None  # `applying` or `renewing` without an end
        self.collector = True

    def __exit__(self, *error: object) -> None:
        self.kill()
        super().__exit__(*error)

    def command(self) -> list[str]:
        frames = "0" if self.no_egress else "1"
        return [sys.executable, "-m", "stonechat_tools.proofs.respond_agent", str(self.folder), frames]

    def settle(self) -> None:
        """Before the end: nothing is renewed any more."""

    def start(self) -> None:
        words = self.command()

        def begin() -> "subprocess.Popen[str]":
            return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

        self.agent = self.device.do(begin)
        self.reader = threading.Thread(target=self._listen, args=(self.agent,), daemon=True)
        self.ready = threading.Event()
        self.reader.start()
        if not self.ready.wait(60):
            raise RuntimeError("the agent does not start")

    def _listen(self, agent: "subprocess.Popen[str]") -> None:
        assert agent.stdout is not None
        for line in agent.stdout:
            word, *_, at = line.split()
            at_s = float(at)
            self.said.append(line.strip())
            with self.lock:
                self._heard(word, at_s)
            if word == "started":
                self.ready.set()

    def _heard(self, word: str, at_s: float) -> None:
        if word in ("applying", "renewing"):
            self.pending_s = at_s
            if word == "applying" and not (self.may_stop and at_s < self.may_stop[-1][1]):
                self.may_stop.append([at_s, float("inf")])
        elif word in ("applied", "renewed"):
            self.pending_s = None
            self.may_stop[-1][1] = at_s + self.t1_s
            self.outcome.leases += word == "applied"
            self.outcome.renewals += word == "renewed"
        elif word == "refused":
            self.pending_s = None
            if self.may_stop and self.may_stop[-1][1] == float("inf"):
                self.may_stop[-1][1] = at_s
        elif word in ("ended", "started", "closed"):
            self._no_longer(at_s)

    def _no_longer(self, at_s: float) -> None:
        if self.may_stop:
            self.may_stop[-1][1] = min(self.may_stop[-1][1], at_s)

    def tell(self, line: str) -> None:
        if self.agent and self.agent.stdin:
            with contextlib.suppress(OSError):
                self.agent.stdin.write(line + "\n")
                self.agent.stdin.flush()

    def kill(self) -> None:
        if self.agent is None:
            return
        self.agent.kill()
        self.agent.wait()
        self.reader.join(10)
        for pipe in (self.agent.stdin, self.agent.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.agent = None
        with self.lock:
            if self.pending_s is not None:  # it may have done it, and had no time to say so
                self.may_stop[-1][1] = time.monotonic() + self.t1_s
                self.pending_s = None

    def close_agent(self) -> None:
        if self.agent is None:
            return
        self.tell("close")
        try:
            self.agent.wait(30)
        except subprocess.TimeoutExpired:
            self.outcome.lock_outs.append("the agent does not end")
        self.kill()

    def happen(self, name: str) -> None:
        self.outcome.events.append(name)
        self.said.append(f"-- {name} {time.monotonic():.6f}")
        getattr(self, "_" + name)()

    def _alarm(self) -> None:
        self.tell(f"alarm {self.rng.choice((QUARANTINE, QUARANTINE, THROTTLE))} {self.t1_s}")

    def _renew(self) -> None:
        """By the collector, while it and the broker are there."""
        if self.collector:
            for sock in list(self.echoes.connections):
                with contextlib.suppress(OSError):
                    sock.send(b"r")

    def _kill_agent(self) -> None:
        self.kill()

    def _start_agent(self) -> None:
        if self.agent is None:
            self.start()

    def _kill_collector(self) -> None:
        self.collector = False

    def _broker_away(self) -> None:
        self.close_broker()

    def _broker_back(self) -> None:
        self.open_broker()
        self.collector = True

    def _wall_clock_jumps(self) -> None:
        self.tell(f"wall {self.rng.choice((-(10**9), -86_400, 86_400, 10**9))}")

    def _suspended(self) -> None:
        self.tell(f"suspended {self.rng.choice((1, self.t1_s, 3600))}")

    def _evidence_gone(self) -> None:
        self.tell("level 0")

    def _release(self) -> None:
        self.tell("release")

    def _allow_list_changed(self) -> None:
        path = self.folder / "etc/resolv.conf"
        path.with_suffix(".new").write_text(f"nameserver {DNS}\nnameserver {DNS6}\nnameserver {NEW_DNS}\n")
        os.replace(path.with_suffix(".new"), path)
        flow = self._flow("new DNS", (NEW_DNS, 53), self.agent is not None)
        flow.since_s = time.monotonic() + FOLLOWS_WITHIN_S
        self.flows.append(flow)

    def _address_changed(self) -> None:
        self.device.ip(
            f"addr replace 10.99.0.3/24 dev {spaces.INTERFACE}",
            f"route replace default via {spaces.GATEWAY} src 10.99.0.3",
        )

    def _reboot(self) -> None:
        """The agent gone, and its network made anew."""
        self.kill()
        self.rebooting = True
        self.close_device()
        with contextlib.suppress(ConfigError):  # it goes with the namespace of its other end, soon or now
            self.outside.ip(f"link del {spaces.INTERFACE}")
        with self.lock:
            self._no_longer(time.monotonic())
        self.device = spaces.Space()
        spaces.join(self.device, self.outside)
        self.open_device()
        self.rebooting = False
        self.outcome.left_behind += self.device.do(tables)
        self.warm_up()  # an interface that has just come up loses packets for a moment

    def _tables_deleted(self) -> None:
        self._damage(lambda batch, family: netfilter_rules.delete_table(batch, family))

    def _rules_flushed(self) -> None:
        table = nfnetlink.text(1, netfilter_rules.TABLE)
        self._damage(lambda batch, family: batch.add("rules", 8, family, table))  # NFT_MSG_DELRULE

    def _damage(self, change: Any) -> None:
        def run() -> None:
            kernel = nfnetlink.NfTables()
            for family in (nfnetlink.INET, nfnetlink.NETDEV):
                batch = nfnetlink.Batch()
                change(batch, family)
                with contextlib.suppress(FileNotFoundError):
                    kernel.run(batch)
            kernel.close()

        self.device.do(run)

    def play(self) -> None:
        self.warm_up()
        self.start()
        self.probe(0.1)
        self.happen("alarm")
        self.probe(self.rng.uniform(0.1, 0.5) * self.PACE)
        for _ in range(self.rng.randrange(3, 8)):
            self.happen(self.rng.choices(list(self.CHANCES), list(self.CHANCES.values()))[0])
            self.probe(self.rng.uniform(0.02, 0.9) * self.PACE)
        self.settle()
        with self.lock:
            last_s = max([until_s for _, until_s in self.may_stop if until_s < float("inf")], default=0.0)
        self.probe(max(0.0, last_s + SLACK_S - time.monotonic()))
        self.probe(0.3)  # all must pass now
        if self.agent is None:
            self.outcome.inert = self.device.do(tables)
            self.start()  # as the service manager does
        self.close_agent()
        self.probe(0.1)
        self.outcome.left_behind += self.device.do(tables)
        self.finish_probes()
        self.judge()
        if self.outcome.lock_outs or self.outcome.left_behind:
            self.outcome.log = self.said + self.counters()

    def judge(self) -> None:
        for least_s, most_s, name in self.stopped_others:
            self.outcome.stopped += 1
            if not any(from_s <= most_s and least_s <= until_s + SLACK_S for from_s, until_s in self.may_stop):
                self.outcome.lock_outs.append(f"{name} stopped at {least_s:.3f}, when nothing was in force")


def tables() -> int:
    """How many tables of ours are in this namespace."""
    kernel = nfnetlink.NfTables()
    found = 0
    for family in (nfnetlink.INET, nfnetlink.NETDEV):
        with contextlib.suppress(FileNotFoundError):
            found += len(list(kernel.ask(nfnetlink.GET_TABLE, family, nfnetlink.text(1, netfilter_rules.TABLE))))
    kernel.close()
    return found
