"""Messages that were not taken, counted by the device they name and by the reason."""

from collections import Counter

from .base import Db

MAX_REJECTED_NAMES = 1000  # devices that are counted for by name; strangers beyond them share one row


def put_rejections(db: Db, counted: Counter[tuple[str, str]], now_s: float) -> None:
    total: Counter[tuple[str, str]] = Counter()
    for (device, reason), count in counted.items():
        device = device[:64].replace("\0", "\ufffd")
        known = db.execute(
            "SELECT 1 FROM rejections WHERE device = ? UNION ALL SELECT 1 FROM devices WHERE name = ?", (device, device)
        ).fetchone()
        if known is None and (device, reason) not in total:
            (names,) = db.execute("SELECT count(*) FROM rejections").fetchone()
            if names + len(total) >= MAX_REJECTED_NAMES:
                device = "(others)"
        total[device, reason] += count
    if total:
        db.executemany(
            "INSERT INTO rejections (device, reason, count, last_s) VALUES (?, ?, ?, ?) ON CONFLICT (device, reason)"
            " DO UPDATE SET count = rejections.count + excluded.count, last_s = excluded.last_s",
            [(*name, count, now_s) for name, count in sorted(total.items())],
        )
