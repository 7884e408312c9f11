"""Replays a fleet's days in virtual time through the collector's own monitor, and counts what it gets wrong.

Each scenario is a fleet of simulated devices (the messages are those that the agent sends, without the seal) with one
kind of trouble. Counted: states that are false, the time until a true one is known, and notifications.
"""

from functools import partial
from typing import Any

from ..fleet.labels import Labels
from ..fleet.store import CONFLICT, DUPLICATE
from ..fleet.wire import Feature, Report, Status
from .virtual_fleet import BEGAN_S, DAY_S, EVERY_S, HOUR_S, MONTH_S, WINDOW_S, Simulated, World, all_of, fleet


def sleepers(seed: int, size: int = 200, hours: float = 24) -> dict[str, Any]:
    """Devices that sleep an hour and are awake for a minute; five never wake up again."""
    world = World(seed)
    dead: dict[str, float] = {}
    planned: dict[str, float] = {}
    for n in range(size):
        device = Simulated(world, f"d-{n}", will=bool(n % 2))

        def cycle(device: Simulated = device) -> None:
            if device.name in dead:
                return
            device.begin()
            device.report()

            def sleep() -> None:
                device.status(sleep_s=3600)
                planned[device.name] = world.now_s + 3600
                device.alive = False
                device.drop()
                world.at(world.now_s + 3600 + world.random.uniform(-60, 120), partial(cycle, device))

            world.at(world.now_s + world.random.uniform(30, 90), sleep)

        world.at(BEGAN_S + world.random.uniform(0, 3600), cycle)
    stop_s = BEGAN_S + (hours - 4) * HOUR_S
    world.at(stop_s, lambda: dead.update({f"d-{n}": stop_s for n in range(5)}))
    world.run(hours * HOUR_S)
    known = [at_s - planned[name] for at_s, name, state in world.states if state == "silent" and name in dead]
    return {
        "false silent": len(world.ever("silent") - dead.keys()),
        "false gone": len(world.ever("gone")),
        "known of 5 that never wake": len(known),
        "intervals until known": round(max(known, default=0) / EVERY_S, 2),
        "asleep seen": len(world.ever("asleep")),
    }


def flapping(seed: int, size: int = 200, hours: float = 24) -> dict[str, Any]:
    """Wi-Fi that is lost every few minutes, for up to three minutes; reports wait in the outbox meanwhile."""
    world = World(seed)
    for device in fleet(world, size):

        def lose(device: Simulated = device) -> None:
            device.drop()
            world.at(world.now_s + world.random.uniform(2, 180), partial(back, device))

        def back(device: Simulated) -> None:
            device.connect()
            world.at(world.now_s + world.random.expovariate(1 / 900), partial(lose, device))

        world.at(BEGAN_S + EVERY_S + world.random.expovariate(1 / 900), lose)
    world.run(hours * HOUR_S)
    lying = len(world.ever("lying"))
    unexplained = sum(device.unexplained for device in world.monitor.fleet)
    return {
        "false silent": len(world.ever("silent")),
        "false lying": lying,
        "false lost": unexplained,
        "flapping seen": sum(device.flapping(world.now_s) for device in world.monitor.fleet),
        "notifications": len(world.firing()),
        "outages": sum(state == "gone" for _, _, state in world.states),
    }


def broker_killed(seed: int, size: int = 2000) -> dict[str, Any]:
    """kill -9 of the broker, twenty minutes later a new one; no last will, devices come back within their back-off."""
    world = World(seed)
    devices = fleet(world, size)

    def kill() -> None:
        world.monitor.connected(False)
        world.up = False
        for device in devices:
            device.connected = False

    def again() -> None:
        world.up = True
        world.monitor.connected(True)
        for device in devices:
            world.at(world.now_s + world.random.uniform(0, 125), device.connect)

    world.at(BEGAN_S + HOUR_S, kill)
    world.at(BEGAN_S + HOUR_S + 1200, again)
    world.run(3 * HOUR_S)
    return {
        "false silent": len(world.ever("silent")),
        "false gone": len(world.ever("gone")),
        "notifications about devices": len([n for n in world.firing() if n.incidents[0].kind != "collector"]),
        "reporting at the end": sum(device.state == "reporting" for device in world.monitor.fleet),
    }


def collector_restarted(seed: int, store: Any, size: int = 500) -> dict[str, Any]:
    """The collector is killed for an hour and begins again from its database; ten devices died meanwhile, a site was
    away before. store: a Store."""
    world = World(seed)
    devices = fleet(world, size)
    for device in devices:  # the database knows them, as put() would have made them known
        store.put([], [_known(device)], now_s=BEGAN_S)
    world.monitor = world.new_monitor(store=store)
    world.monitor.connected(True)
    away = devices[: size // 5]
    dead = {device.name for device in devices[-10:]}
    world.at(BEGAN_S + HOUR_S, lambda: all_of(Simulated.die, away))

    def kill() -> None:
        world.up = False

    def again() -> None:
        for device in devices[-10:]:
            device.die()
        world.up = True
        world.monitor = world.new_monitor(store=store)
        world.monitor.connected(True)
        for device in devices[size // 5 : -10]:
            world.at(world.now_s + world.random.uniform(0, 5), device.connect)

    world.at(BEGAN_S + 2 * HOUR_S, kill)
    world.at(BEGAN_S + 3 * HOUR_S, again)
    world.run(3 * HOUR_S - 1)
    before = len(world.firing())
    world.run(5 * HOUR_S)
    gone = {device.name for device in away}
    return {
        "false silent": len(world.ever("silent") - dead - gone),
        "notifications before": before,
        "notifications after": len(world.firing()) - before,
        "dead found": len(dead & {d.name for d in world.monitor.fleet if d.state in ("silent", "gone")}),
    }


def _known(device: Simulated) -> Status:
    return Status(device.name, 0, None, 1, True, b"none", 1, window_ms=WINDOW_S * 1000, heartbeat_s=EVERY_S)


def clock_jumps(seed: int, size: int = 300) -> dict[str, Any]:
    """The collector's clock jumps by hours, both ways; so do the clocks of half of the devices."""
    world = World(seed)
    devices = fleet(world, size)

    def jump(seconds: float) -> None:
        world.skew_s += seconds

    def devices_jump(seconds: float) -> None:
        for device in devices[::2]:
            device.skew_s += seconds

    for hour, seconds in ((1, 5 * HOUR_S), (2, -9 * HOUR_S), (3, 40 * 365 * DAY_S), (4, -40 * 365 * DAY_S)):
        world.at(BEGAN_S + hour * HOUR_S, partial(jump, seconds))
        world.at(BEGAN_S + hour * HOUR_S + 1800, partial(devices_jump, seconds))
    dead = devices[0]
    world.at(BEGAN_S + 4.5 * HOUR_S, dead.die)
    dead.will = False
    world.run(6 * HOUR_S)
    return {
        "false silent": len(world.ever("silent") - {dead.name}),
        "dead found": int(dead.name in world.ever("silent")),
        "false lying": len(world.ever("lying")),
        "notifications": len(world.firing()),
    }


def router(seed: int, size: int = 2000, others: int = 500, wills: bool = True, labelled: bool = True) -> dict[str, Any]:
    """A router dies with `size` devices behind it, and is back four hours later."""
    world = World(seed)
    devices = fleet(world, size + others, will=wills)
    if labelled:
        world.monitor.labels = {f"d-{n}": Labels(site="north" if n < size else "south") for n in range(size + others)}
    died_s = BEGAN_S + 2 * HOUR_S
    world.at(died_s, lambda: all_of(Simulated.drop, devices[:size]))

    def back() -> None:
        for device in devices[:size]:
            world.at(world.now_s + world.random.uniform(0, 125), device.connect)

    world.at(died_s + 3.9 * HOUR_S, back)
    world.run(8 * HOUR_S)
    first = next((each for each in world.firing()), None)
    return {
        "notifications": len(world.firing()),
        "resolved": sum(each.reason == "resolved" for each in world.notified),
        "seconds until notified": None if first is None else round(first.at_s - died_s),
        "named": "" if first is None else first.incidents[0].title,
        "devices in it": 0 if first is None else first.incidents[0].count,
        "open at the end": len(world.monitor.incidents.open),
    }


def true_silence(seed: int, size: int = 200, hours: float = 12) -> dict[str, Any]:
    """Devices whose power is cut at a random time, with no last will; how long until that is known."""
    world = World(seed)
    died: dict[str, float] = {}
    for device in fleet(world, size, will=False):
        if world.random.random() < 0.25:

            def die(device: Simulated = device) -> None:
                died[device.name] = world.now_s
                device.die()

            world.at(BEGAN_S + world.random.uniform(1, hours - 1) * HOUR_S, die)
    world.run(hours * HOUR_S)
    known = {name: at_s - died[name] for at_s, name, state in world.states if state == "silent" and name in died}
    return {
        "died": len(died),
        "known": len(known),
        "false silent": len(world.ever("silent") - died.keys()),
        "intervals until known": round(max(known.values(), default=0) / EVERY_S, 2),
    }


def key_used_twice(seed: int, size: int = 30) -> dict[str, Any]:
    """Thieves: one clones an image, one uses the numbers of the running device, one sends old reports again."""
    world = World(seed)
    devices = fleet(world, size)
    cloned, numbered, replayed = devices[:3]
    thief = Simulated(world, cloned.name)
    thief.start(BEGAN_S + 3 * HOUR_S)
    old: list[Report] = []
    original = replayed.report

    def recorded(*arguments: Any, **more: Any) -> Report:
        old.append(original(*arguments, **more))
        return old[-1]

    replayed.report = recorded  # type: ignore[method-assign]

    def other_bytes() -> None:
        world.heard(
            [Report(numbered.name, numbered.sequence, numbered.boot, int(world.now_s), None, numbered.stream)], CONFLICT
        )

    def replay() -> None:
        world.heard([old[0]], DUPLICATE)

    def resend() -> None:  # what a device does that missed an acknowledgement: no sign of anything
        world.heard(old[-20:], DUPLICATE)

    world.at(BEGAN_S + 3 * HOUR_S, other_bytes)
    world.at(BEGAN_S + 4 * HOUR_S, resend)
    world.at(BEGAN_S + 9 * HOUR_S, replay)
    for device in devices[5:]:  # restarts, also quick ones, with reports that were waiting: nobody is lying
        for hour in (2, 3, 5):
            world.at(BEGAN_S + hour * HOUR_S + world.random.uniform(0, 600), device.begin)
    world.run(12 * HOUR_S)
    lying = {name: at_s for at_s, name, state in world.states if state == "lying"}
    return {
        "thieves seen": len(lying.keys() & {device.name for device in devices[:3]}),
        "false lying": len(lying.keys() - {device.name for device in devices[:3]}),
        "clone seen after min": round((lying.get(cloned.name, 0) - BEGAN_S - 3 * HOUR_S) / 60),
        "notifications": len(world.firing()),
    }


# --- the fleet's sense ------------------------------------------------------------------------------------------------


MIRAI = [Feature(3, 6.0, 60), Feature(7, 4.0, 25), Feature(1, 2.0, 10)]


def _alarm(world: World, device: Simulated, features: list[Feature]) -> None:
    device.report(2, features, surprise_q8=900, evidence_q8=5000)

    def over() -> None:
        device.report(0)

    world.at(world.now_s + 120, over)


def _causes(world: World) -> list[Feature]:
    """An explanation of an alarm that chance has made: half of them are of one kind, as in a real fleet."""
    index = 3 if world.random.random() < 0.5 else world.random.randrange(39)
    return [Feature(index, world.random.choice((-4.0, 5.0)), 60), Feature(world.random.randrange(39), 3.0, 25)]


def quiet(seed: int, size: int = 2000, days: float = 7, alarms_per_month: float = 1.0) -> dict[str, Any]:
    """Nothing but the alarms that chance makes."""
    world = World(seed)
    devices = [Simulated(world, f"d-{n}", every_s=DAY_S) for n in range(size)]
    for device in devices:
        device.begin()
    rate = alarms_per_month * size / MONTH_S

    def alarm() -> None:
        _alarm(world, world.random.choice(devices), _causes(world))
        world.at(world.now_s + world.random.expovariate(rate), alarm)

    world.at(BEGAN_S + world.random.expovariate(rate), alarm)
    seen: set[str] = set()
    while world.now_s < BEGAN_S + days * DAY_S:
        world.run(world.now_s - BEGAN_S + 600, step_s=60)
        seen |= {f"{each.kind} {each.start_s:.0f}" for each in world.monitor.sense.open.values()}
    return {"fleet alerts": len(seen), "alarms": world.monitor.incidents._last_id}


def outbreak(seed: int, size: int = 2000, share: float = 0.03, before_days: float = 1.0) -> dict[str, Any]:
    """A botnet takes `share` of the devices within a minute; each alarms within half a minute of that."""
    world = World(seed)
    devices = [Simulated(world, f"d-{n}", every_s=DAY_S) for n in range(size)]
    for device in devices:
        device.begin()
    rate = size / MONTH_S

    def alarm() -> None:
        _alarm(world, world.random.choice(devices), _causes(world))
        world.at(world.now_s + world.random.expovariate(rate), alarm)

    world.at(BEGAN_S + world.random.expovariate(rate), alarm)
    world.run(before_days * DAY_S, step_s=20)
    began_s = world.now_s
    taken = world.random.sample(devices, int(size * share))
    for device in taken:
        at_s = began_s + world.random.uniform(0, 60) + world.random.uniform(10, 30)
        world.at(at_s, partial(_alarm, world, device, MIRAI))
    known_s = None
    while known_s is None and world.now_s < began_s + 600:
        world.run(world.now_s - BEGAN_S + 1)
        for each in world.firing():
            if each.incidents[0].kind == "outbreak":
                known_s = each.at_s - began_s
    return {"seconds until alerted": known_s, "devices": len(taken)}


def soak(scale: float) -> bool:
    """All scenarios; 100 * scale seeds of the quiet week. Prints a line for each."""
    from ..fleet.store import Store

    held = True

    def show(name: str, found: dict[str, Any], good: bool) -> None:
        nonlocal held
        held &= good
        print(
            f"{'ok  ' if good else 'FAIL'} {name}: {', '.join(f'{key} {value}' for key, value in found.items())}",
            flush=True,
        )

    size = max(200, int(2000 * min(1.0, scale)))
    found = sleepers(1)
    show("sleepers", found, found["false silent"] == 0 and found["known of 5 that never wake"] == 5)
    found = flapping(2)
    show("flapping Wi-Fi", found, found["false silent"] == 0 and found["false lying"] == 0)
    found = broker_killed(3, size)
    show("broker killed", found, found["false silent"] == found["notifications about devices"] == 0)
    with Store(":memory:") as store:
        found = collector_restarted(4, store)
    show("collector restarted", found, found["false silent"] == 0 and found["dead found"] == 10)
    found = clock_jumps(5)
    show("clock jumps", found, found["false silent"] == 0 and found["dead found"] == 1)
    for wills in (True, False):
        for labelled in (True, False):
            found = router(6, size, wills=wills, labelled=labelled)
            what = f"router dies ({'last wills' if wills else 'no last will'}, {'sites' if labelled else 'no labels'})"
            show(what, found, found["notifications"] == 1)
    found = true_silence(7)
    show("true silence", found, found["known"] == found["died"] and found["intervals until known"] <= 2)
    found = key_used_twice(8)
    show("keys used twice", found, found["thieves seen"] == 3 and found["false lying"] == 0)
    times = [outbreak(seed)["seconds until alerted"] for seed in range(max(1, int(20 * scale)))]
    worst = max((each for each in times if each is not None), default=None)
    show("outbreak of 3 %", {"runs": len(times), "worst seconds": worst}, None not in times and (worst or 999) <= 120)
    weeks = max(2, int(100 * scale))
    alerts = [quiet(seed)["fleet alerts"] for seed in range(weeks)]
    show("quiet weeks", {"weeks": weeks, "fleet alerts": sum(alerts), "worst week": max(alerts)}, max(alerts) <= 1)
    return held
