"""What the response does about each infection of a small product, on MicroPython, with virtual time:

    micropython respond.py MODEL PORT SEED ACTION

ACTION: throttle or quarantine. The product learns, then gets each infection in turn, for 40 windows, and recovers in
between. Prints a line each: in which window it alarmed, bytes that strangers got in an average window before the
response and under it, calls passed and stopped, and how often the vendor's hook was called. With the action "none":
without a response, whose windows are those that it would have had. What the product itself does raises here where it is
refused.
"""

import sys

from stonechat_tools.lab.firmware import sensor as fw

WINDOWS = 40
SETTLED = 200  # windows before the first infection
_NEW_PEER_BYTES = 11  # a column of micropython-1


class Product(fw.Firmware):
    """An infection that is refused goes on; what the product does itself is not caught here."""

    def infected(self):
        try:
            getattr(self, self.name)()
        except OSError:
            pass

    def start(self, name):
        self.name = name
        self.infection = name and "infected"


def main(arguments):
    from stonechat.board import guard, hooks

    counter = hooks.install()
    import socket

    from stonechat import policy
    from stonechat.agent import Agent
    from stonechat.delivery import Delivery
    from stonechat.model import load_model
    from stonechat.outbox_memory import MemoryOutbox
    from stonechat.state import State

    path, port, seed, action = arguments
    counter.secret = b"secret"
    firmware = Product(socket, int(port), int(seed), counter.beat)
    guard.ticks_ms = lambda: firmware.now_ms  # type: ignore[attr-defined]
    called = []
    rules = [(policy.HOOK, 2, 0, 0, 0, 0)]
    if action != "none":
        number = policy.ACTIONS.index(action)
        rules.insert(0, (number, 2, policy.NETWORK, 0, 300, 300))
    response = guard.respond(policy.ON, tuple(rules), hook=lambda *facts: called.append(facts))
    reporter = Delivery("board", b"k" * 32, MemoryOutbox(), bytes_per_day=0)
    agent = Agent(
        counter, load_model(open(path, "rb")), reporter=reporter, state=State(), response=response, learn_peers_hours=0
    )
    lives = Lives(firmware, agent)
    while agent.learning or agent.windows < SETTLED:
        lives.window()
    for infection in fw.INFECTIONS:
        for _ in range(600):  # recover
            verdict = lives.window()
            if verdict is not None and not verdict.level and not verdict.evidence_q8 and not response.real.action:
                break
        for _ in range(40):
            lives.window()  # beyond the pause
        del called[:]
        response.real.pause_until_s = 0
        firmware.start(infection)
        alarm = before = during = under = stopped = passed = 0
        for number in range(WINDOWS):
            in_force = response.real.action or action == "none" and alarm
            lives.window()
            if in_force and (response.real.action or action == "none"):  # all of it
                during += lives.strange
                under += 1
            elif not in_force and not alarm:
                before += lives.strange
            if not alarm and agent.channels[0].scorer.verdict.level == 2:
                alarm = number + 1
            if response.real.action:
                passed, stopped = response.enforcer.counts()
        firmware.start(None)
        response.real.end(reporter.uptime_s)
        print(
            "infection %s alarm %d before %d during %d passed %d stopped %d hook %d"
            % (infection, alarm, before // max(1, alarm), during // max(1, under), passed, stopped, len(called))
        )
    print("product errors %d" % agent.errors)
    firmware.close()


class Lives:
    """Windows of the firmware's life, each closed by the agent."""

    def __init__(self, firmware, agent):
        self.firmware = firmware
        self.agent = agent
        self.strange = 0  # bytes sent to peers that the device does not know, in the last window

    def window(self):
        for _ in range(fw.WINDOW_MS // fw.TURN_MS):
            self.firmware.turn()
        verdict = self.agent.end_window(self.firmware.now_ms)
        self.agent.response.turn()
        self.agent.reporter.outbox.ack(0, 0xFFFFFFFF, self.agent.reporter.stream)
        self.strange = self.agent.channels[0].window.deltas[_NEW_PEER_BYTES]
        return verdict


if __name__ == "__main__":
    main(sys.argv[1:])
