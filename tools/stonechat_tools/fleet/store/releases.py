"""Releases that were published: signed manifests and models. Each function raises StoreError, with nothing changed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stonechat import manifest
from stonechat.errors import WireError

if TYPE_CHECKING:
    from .store import Store


@dataclass(frozen=True, slots=True)
class Release:
    """As it was published, but for its bytes. schema: of its model, hex; empty for a release without one."""

    id: int
    device_class: str
    version: int
    schema: str
    digest: bytes
    manifest_bytes: int
    model_bytes: int
    published_s: float
    published_by: str

    def __str__(self) -> str:
        return f"{self.device_class} {self.version}"


COLUMNS = (
    "x.id, x.class, x.version, x.schema_id, x.digest, length(x.manifest), coalesce(length(x.model), 0), x.published_s,"
    " x.published_by"
)


def publish(
    store: "Store",
    device_class: str,
    version: int,
    schema: str,
    digest: bytes,
    message: bytes,
    model: bytes | None,
    by: str,
    now_s: float,
) -> bytes:
    """Keep a release, if there is none of this class and version -> the digest of the one that is there."""
    with store.transaction() as db:
        db.execute(
            "INSERT INTO releases (class, version, schema_id, digest, manifest, model, published_s, published_by)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (device_class, version, schema, digest, message, model, now_s, by),
        )
        query = "SELECT digest FROM releases WHERE class = ? AND version = ?"
        return bytes(db.execute(query, (device_class, version)).fetchone()[0])


def releases(store: "Store", device_class: str | None = None) -> list[Release]:
    where, values = ("", ()) if device_class is None else (" WHERE x.class = ?", (device_class,))
    return [
        of_row(row)
        for row in store.rows(f"SELECT {COLUMNS} FROM releases x{where} ORDER BY x.class, x.version", values)
    ]


def content(store: "Store", release: int) -> tuple[bytes, bytes]:
    """-> the signed manifest and the model, which is empty where there is none."""
    ((message, model),) = store.rows("SELECT manifest, model FROM releases WHERE id = ?", (release,))
    return bytes(message), bytes(model or b"")


class Manifests:
    """What a roll-out must know of its release's manifest, read once."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        self._known: dict[int, tuple[bool, float]] = {}

    def rotating(self, ids: Iterable[int]) -> set[int]:
        """Which of them replace the keys of devices: later ones are signed with keys that a device has only from them.
        Raises StoreError."""
        return {one for one in ids if self._facts(one)[0]}

    def expired(self, release: int, now_s: float) -> bool:
        """Raises StoreError."""
        return now_s >= self._facts(release)[1]

    def _facts(self, release: int) -> tuple[bool, float]:
        found = self._known.get(release)
        if found is None:
            ((message,),) = self._store.rows("SELECT manifest FROM releases WHERE id = ?", (release,))
            try:
                read = manifest.read(manifest.payload(bytes(message)))
                found = bool(read.keys), float(read.expires_s)
            except WireError:
                found = False, float("inf")
            self._known[release] = found
        return found


def of_row(row: Sequence[Any]) -> Release:
    return Release(row[0], row[1], row[2], row[3], bytes(row[4]), *row[5:])
