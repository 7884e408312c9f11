# mypy: ignore-errors
"""Cuts the power in the middle of an installation, again and again. A device always has a whole model to run, and runs
none as final that the collector has not acknowledged.

    micropython life/update_cuts.py CUTS SEED     on littlefs on a simulated NOR flash; prints one line of JSON
    python life/update_cuts.py victim FOLDER      one life in a folder, to be ended by kill -9; says what it confirms

A device pulls version 2, tries it, is confirmed, then version 3, and so on with a new device."""

import os
import sys

HERE = __file__.rsplit("/", 1)[0] if "/" in __file__ else "."
sys.path[:0] = [HERE, HERE + "/..", HERE + "/../../agent"]

from stonechat import cbor_decode  # noqa: E402
from stonechat.compat import sha256  # noqa: E402
from stonechat.slots import FACTORY, Slots  # noqa: E402
from stonechat.update import CHUNK_BYTES, CONFIRM, OFFER, Update  # noqa: E402

NOW_S = 1_800_000_000
MODEL = bytes([i * 7 & 255 for i in range(1000)])
STREAM = b"boot"
with open(HERE + "/../golden/releases/updates.cbor", "rb") as file:
    RELEASES = cbor_decode.loads(file.read())
STEPS = ((2, RELEASES["second"]), (3, RELEASES["third"]))


def load(path, rules=None, golden=None):
    with open(path, "rb") as file:
        return file.read()


def wrong_with(store, slot, acknowledged):
    """What is not as it must be at the start of a device; "" where all is well."""
    if store.version and store.version not in acknowledged:
        return "version %d is final without an acknowledgement" % store.version
    if slot != FACTORY:
        try:
            if load(store.path(slot) + ".model") != MODEL:
                return "the model in slot %d is not whole" % slot
        except OSError:
            return "slot %d has no model" % slot
    return ""


def live(folder, acknowledged, confirming, step=bool):
    """One life, until the power fails or both versions are final. acknowledged: versions that the collector has
    confirmed; confirming(version) is called before each, step() at each step of the installation -> what was wrong at
    its start, or ""."""
    store = Slots(folder)
    slot = store.start()
    wrong = wrong_with(store, slot, acknowledged)
    update = Update(store, STREAM, [[0, RELEASES["key"]]], "pump", b"schema-1", 4096, load, bool)
    for version, message in STEPS:
        if store.trial and store.tried == version:
            confirming(version)
            update.on_message({0: 1, 1: version, 2: CONFIRM, 7: STREAM})
        if wrong or version <= store.version:
            continue
        update.on_message(
            {0: 1, 1: version, 2: OFFER, 3: version, 5: sha256(message).digest(), 6: len(message), 7: STREAM}
        )
        while update.offered:
            step()
            want = update.want()
            if want:
                part, at = want
                data = (message, MODEL)[part][at : at + CHUNK_BYTES]
                update.on_message({0: 1, 1: version, 2: part, 3: at, 4: data, 7: STREAM})
            else:
                update.step(NOW_S, 0)
        if store.trial != (store.spare if store.trial else -1):
            return "version %d was refused: %d" % (version, store.result)
        return wrong  # the new model is to run: the next life confirms it
    return wrong


def run(cuts, seed):
    import random

    from power_cuts import Flash, mount

    random.seed(seed)
    figures = {"cuts": 0, "lives": 0, "devices": 0, "installed": 0, "wrong": 0, "first": ""}
    while figures["cuts"] < cuts:
        flash = Flash()
        os.VfsLfs2.mkfs(flash, progsize=256)
        figures["devices"] += 1
        acknowledged = set()
        for _ in range(400):
            mount(flash)
            flash.left = 1 + random.getrandbits(10) % 60
            wrong = ""
            try:
                wrong = live("/f/update", acknowledged, acknowledged.add)
            except OSError:
                pass  # the power has failed
            figures["lives"] += 1
            figures["cuts"] += flash.left == 0
            flash.left = 0
            try:
                os.umount("/f")
            except OSError:
                pass
            flash = Flash(bytearray(flash.data))
            if wrong:
                figures["wrong"] += 1
                figures["first"] = figures["first"] or wrong
                break
            mount(flash)
            final = Slots("/f/update").version
            os.umount("/f")
            if final == 3:
                figures["installed"] += 1
                break
        else:
            figures["wrong"] += 1
            figures["first"] = figures["first"] or "400 lives were not enough"
    return figures


def victim(folder):
    """Says `step` before each step, `confirm N` before it confirms, `wrong WHY`, or `done`, each line at once."""
    acknowledged = {int(word) for word in sys.argv[3:]}

    def say(text):
        os.write(1, (text + "\n").encode())

    def confirming(version):
        acknowledged.add(version)
        say("confirm %d" % version)

    for _ in range(8):
        wrong = live(folder, acknowledged, confirming, lambda: say("step"))
        if wrong:
            say("wrong " + wrong)
            return
        if Slots(folder).version == 3:
            say("done")
            return


if __name__ == "__main__":
    import json

    if sys.argv[1] == "victim":
        victim(sys.argv[2])
    else:
        print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
