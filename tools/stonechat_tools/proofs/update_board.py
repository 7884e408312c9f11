# mypy: ignore-errors
"""A board that takes releases, on MicroPython in real time. Not imported by the tools: MicroPython runs it.

    micropython update_board.py CONFIG.json

CONFIG: device, fleet, key (hex), model, folder, host, port, class, keys ([[role, hex], ...]), windows.
"""

import json
import sys


def main(path):
    from stonechat.board import hooks

    hooks.install()
    import time

    with open(path) as file:
        config = json.load(file)
    from stonechat.board import full
    from stonechat.updater import Updater

    def octets(text):
        return bytes([int(text[i : i + 2], 16) for i in range(0, len(text), 2)])

    update = Updater(
        config["class"],
        [[role, octets(key)] for role, key in config["keys"]],
        config["folder"] + "/update",
        windows=config["windows"],
        bytes_per_day=10_000_000,
    )
    watch = full.start(
        config["device"],
        octets(config["key"]),
        config["model"],
        host=config["host"],
        port=config["port"],
        fleet=config["fleet"],
        folder=config["folder"] + "/data",
        keepalive_s=10,
        heartbeat_windows=1,
        bytes_per_day=0,
        outbox_bytes=65536,
        update=update,
    )
    errors = 0
    while True:
        watch.tick()
        if watch.errors != errors:
            errors = watch.errors
            print("error", watch.last_error)
        time.sleep_ms(50)


if __name__ == "__main__":
    main(sys.argv[1])
