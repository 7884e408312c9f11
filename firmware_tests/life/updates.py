"""A board that takes releases, on MicroPython, from its built package: time is virtual, the broker is real.

    micropython updates.py LIB FOLDER MODEL BROKER_PORT DEVICE KEY PUBLIC [reset]

LIB: folder of the package. KEY, PUBLIC: the device's secret and the vendor's public key, in hexadecimal. reset: another
model runs after a reset, which here is the end of the process. Reads a command a line, and answers each with a line:

    windows N     let N windows pass             -> windows, highest level, errors
    turn N        N turns with the network       -> the status's key 24, the model's digest, whether it learns
"""

import sys

lib, folder, model, port, device, key, public = sys.argv[1:8]
sys.path.insert(0, lib)

from stonechat import compat  # noqa: E402

now_ms = 1
real_sleep_ms = compat.sleep_ms


def ticks_ms():
    return now_ms


compat.ticks_ms = ticks_ms  # before anything takes it from there

from stonechat.board import full, hooks  # noqa: E402
from stonechat.updater import Updater  # noqa: E402


def main():
    global now_ms
    restart = sys.exit if sys.argv[8:] == ["reset"] else None
    update = Updater("pump", ((0, bytes.fromhex(public)),), folder + "/update", 16_384, 10_000_000, 8, restart)
    watch = full.start(
        device,
        bytes.fromhex(key),
        model,
        host="127.0.0.1",
        port=int(port),
        folder=folder,
        firmware="1.0",
        keepalive_s=7200,
        heartbeat_windows=1,
        bytes_per_day=0,
        outbox_bytes=65_536,
        update=update,
    )
    print("started", update.status)
    while True:
        words = sys.stdin.readline().split()
        if not words:
            break
        count = int(words[1])
        if words[0] == "windows":
            until = watch.agent.windows + count
            highest = turns = 0
            while watch.agent.windows < until and turns < 60 * count + 200:
                now_ms += 250
                turns += 1
                verdict = watch.tick()
                if verdict is not None:
                    highest = max(highest, verdict.level)
            agent = watch.agent
            print("windows", agent.windows, highest, watch.errors, agent.errors, watch.last_error, agent.last_error)
        else:
            for _ in range(count):
                now_ms += 250  # as above: how often the loop turns is one of the counters
                watch.tick()
                real_sleep_ms(5)
            scorer = watch.agent.channels[0].scorer
            print(
                "turned",
                update.status,
                scorer.model.digest.hex(),
                watch.agent.learning,
                watch.agent.reporter.rejected,
                watch.last_error,
                watch.agent.offline,
                "level %d" % scorer.verdict.level,
            )
    watch.save()
    hooks.remove()


main()
