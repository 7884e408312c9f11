"""Takes a signed release: offered by the collector, pulled in chunks, verified, tried, and final only when the
collector has acknowledged it. manifest.py says what a release is, slots.py where it is kept, release.cddl the messages.

    offer ->      version, digest and size of a manifest
    <- want       the chunk that is missing: which part, from which byte; sent again until it comes
    chunk ->      written down at once, so that a device goes on after a power cut where it was
                  manifest whole: signatures, class, schema, version, floor, days
                  model whole: its SHA-256; then it is loaded, runs its golden vectors and the device's own last windows
                  without a model: the running one is copied, and the new alarm rules or policy are tried with it
                  trial: the new model watches; a device that restarts too often, or waits too long, goes back by itself
    confirm ->    final
    withdraw ->   back to the version before, if it is not below the floor

Every message is sealed with a key of this device, and nothing of a release counts before its signature is verified: a
collector or a broker can withhold a release, but not change one.
"""

from . import manifest, slots
from .compat import const, sha256, sync_file
from .cose_open import is_count
from .errors import StonechatError, WireError

CHUNK_BYTES = const(384)  # a sealed chunk fits into 512
OFFER = const(0)
CONFIRM = const(1)
WITHDRAW = const(2)
_TRIAL_S = const(86_400)  # without an acknowledgement
_READ_BYTES = const(512)
_PARTS = (".manifest", ".model")
# After these a device takes the same version again when it is offered: nothing is wrong with the release itself.
_AGAIN = (slots.EARLY, slots.CLOCK, slots.DIGEST, slots.UNCONFIRMED, slots.STORAGE)


class Update:
    """store: a Slots that was started. stream: of this start. own_keys: ((role, public key), ...) that the device came
    with. device_class: text. schema_id: of the collector. most_bytes: the largest model that this device takes.
    load(path, rules, golden): the model in a file under the alarm rules ([] for its own); golden: the digest that its
    golden vectors must have, None for a copy of the running model. suits(model): whether they are right and it is quiet
    on the device's own windows. Either may raise. factory: path of the model that the device came with.
    accepts(policy): raises StonechatError for one that the response can't follow; None: there is no response.

    offered: version of the release that is being pulled, 0 for none. refusals: releases that were refused since this
    start."""

    def __init__(
        self,
        store,
        stream: bytes,
        own_keys,
        device_class: str,
        schema_id: bytes,
        most_bytes: int,
        load,
        suits,
        factory: str = "",
        accepts=None,
    ) -> None:
        self.store = store
        self._stream = stream
        self.offered = self.refusals = 0
        self._own_keys = own_keys
        self._class = device_class
        self._schema_id = schema_id
        self._most_bytes = most_bytes
        self._load = load
        self._suits = suits
        self._factory = factory
        self._accepts = accepts
        self._digest = b""  # SHA-256 of the manifest that was offered
        self._sizes = [0, 0]  # of manifest and model
        self._found: manifest.Manifest | None = None  # verified
        self._slot = 0  # where the parts go
        self._trial_s = -1  # seconds since this start at which the trial was first seen
        self._number = -1  # the highest of an offer in this start
        self._final: list = []  # versions confirmed in this start: a second confirmation of one is a replay
        mark = slots.read_checked(store.folder + "/offer")
        if mark and not (store.trial or store.stale) and mark[1] > store.version and not self._failed(mark[1]):
            # It goes on where the last start was.
            self._digest, self.offered, self._sizes[0] = mark
            self._slot = store.spare

    # --- messages ---------------------------------------------------------------------------------------------------

    def on_message(self, fields: dict) -> bool:
        """fields: of an authentic message -> whether another model is to run from now on. Raises WireError for a
        malformed one, OSError where the medium refuses."""
        version, what = fields.get(1), fields.get(2)
        chunk = 4 in fields
        if not is_count(version) or not version or not chunk and what not in (OFFER, CONFIRM, WITHDRAW):
            raise WireError
        if fields.get(7) != self._stream:  # what was sent to an earlier start is a replay, or a chunk that comes late
            self.refusals += not chunk
        elif chunk:
            self._chunk(version, what, fields.get(3), fields[4])
        elif what == OFFER:
            self._offer(version, fields.get(3), fields.get(5), fields.get(6))
        else:
            return self._withdraw(version) if what == WITHDRAW else self._confirm(version)
        return False

    def _offer(self, version, number, digest, size):
        if not isinstance(digest, bytes) or len(digest) != 32 or not is_count(size) or not size or not is_count(number):
            raise WireError
        store = self.store
        is_new = number > self._number  # else it is a replay: of one whose release may have been withdrawn since
        if is_new:
            self._number = number
        if store.trial or version == self.offered and digest == self._digest:
            return
        if not is_new or version <= store.version or self._failed(version):
            self.refusals += version != store.version  # what runs already is no fault
            return
        self._forget()
        self.offered, self._digest = version, digest
        self._sizes = [size, 0]
        if size > manifest.MOST_BYTES:
            self._refuse(slots.TOO_LARGE)
            return
        self._slot = store.spare
        slots.remove(store.folder + "/offer")
        store.free()  # what was pulled of another release is of no use
        if (
            version == store.tried and store.result != slots.NONE
        ):  # another try: how the last one ended no longer counts
            store.result = slots.NONE
            store.save()
        slots.write_checked(store.folder + "/offer", [digest, version, size])

    def _failed(self, version):
        store = self.store
        return version == store.tried and store.result > slots.CONFIRMED and store.result not in _AGAIN

    def _chunk(self, version, part, offset, data):
        if (
            part not in (0, 1)
            or not is_count(offset)
            or not isinstance(data, bytes)
            or not 0 < len(data) <= CHUNK_BYTES
        ):
            raise WireError
        # One that is late, comes twice or out of order is passed over: want() asks for what is missing.
        if version == self.offered and (part, offset) == self.want():
            if offset + len(data) > self._sizes[part]:
                raise WireError
            slots.append(self._path(part), data)

    def want(self):
        """(part, offset) of the chunk that is missing, None where nothing is."""
        if self.offered:
            for part in (0, 1):
                have = slots.size(self._path(part))
                if have < self._sizes[part]:
                    return part, have
        return None

    def _path(self, part):
        return self.store.path(self._slot) + _PARTS[part]

    # --- verifying and trying ---------------------------------------------------------------------------------------

    @property
    def whole(self) -> bool:
        """The manifest is verified and the model is there: step() proves it, which takes longest."""
        return self._found is not None and not self.want()

    def step(self, now_s: int, uptime_s: int) -> bool:
        """Do what is due: verify a part that is whole, begin a trial, end one that nobody acknowledged. It can take a
        second on a board. now_s: Unix seconds, 0 where that is not known; uptime_s: since this start -> whether another
        model is to run from now on. Raises OSError where the medium refuses."""
        store = self.store
        if store.trial:
            if self._trial_s < 0:
                self._trial_s = uptime_s
            elif uptime_s - self._trial_s > _TRIAL_S:
                self._end_trial(slots.UNCONFIRMED)
                return True
            return False
        if not self.offered or self.want():
            return False
        if self._found is None:
            result = self._verify(now_s)
            if result:
                self._refuse(result)
            return False
        result = self._judge(self._found, now_s) or self._prove(self._found)  # the model may have come for weeks
        if result:
            self._refuse(result)
            return False
        store.begin_trial(self._slot, self.offered)
        self._trial_s = -1
        self._forget()
        slots.remove(store.folder + "/offer")
        return True

    def _verify(self, now_s):
        """The manifest is whole -> why it is refused, or 0."""
        packed = slots.read(self._path(0), self._sizes[0])
        if sha256(packed).digest() != self._digest:
            return slots.DIGEST
        try:
            if self.store.keys_came_with(self._digest):
                # It was verified with the keys that it has replaced: the power was cut before it was final.
                found = manifest.read(manifest.payload(packed))
                if found.model or found.rules or found.policy:
                    return slots.SIGNATURE
            else:
                found = manifest.unseal(packed, self.store.keys(self._own_keys))
        except WireError as error:
            return slots.SIGNATURE if "signature" in str(error) else slots.MALFORMED
        result = self._judge(found, now_s)
        if result:
            return result
        if not (found.model or found.rules or found.policy):
            self._adopt(found)
            return 0
        self._found = found
        self._sizes[1] = found.model[1] if found.model else 0
        if slots.size(self._path(1)) > self._sizes[1]:
            slots.remove(self._path(1))
        return 0

    def _adopt(self, found):
        """A release of keys alone needs no trial."""
        store = self.store
        store.put_keys(found.keys, self._digest)
        store.adopt(found.version, found.floor)
        slots.remove(store.folder + "/offer")
        self._forget()

    def _judge(self, found, now_s):
        if found.version != self.offered:
            return slots.VERSION
        if found.version < self.store.floor:
            return slots.FLOOR
        if found.device_class != self._class:
            return slots.CLASS
        if not now_s:
            return slots.CLOCK
        if now_s < found.not_before_s:
            return slots.EARLY
        if now_s >= found.expires_s:
            return slots.EXPIRED
        if found.policy and self._accepts is not None:
            try:
                self._accepts(found.policy)
            except StonechatError:
                return slots.MALFORMED
        if found.model is None:
            return 0 if found.keys or found.rules or self._accepts else slots.NOTHING
        if found.model[2] != self._schema_id:
            return slots.SCHEMA
        return slots.TOO_LARGE if found.model[1] > self._most_bytes else 0

    def _prove(self, found):
        """The model is whole -> why it is refused, or 0."""
        store = self.store
        path = self._path(1)
        rules, policy, own_model = store.settings(store.slot)
        if found.model:
            rules = []
            own_model = True
            if _digest(path) != found.model[0]:
                return slots.DIGEST
        else:
            slots.remove(path)
            _copy(store.path(store.slot) + ".model" if store.slot else self._factory, path)
        rules = found.rules or rules
        store.put_settings(self._slot, [rules, found.policy or policy, own_model and found.own_model])
        try:
            model = self._load(path, rules, found.model and found.model[3])
            return 0 if self._suits(model) else slots.UNSUITED
        except OSError:
            raise
        except Exception:  # noqa: BLE001 - whatever a model makes go wrong, the one that runs goes on
            return slots.MODEL

    def _refuse(self, result):
        store = self.store
        self.refusals += 1
        store.tried, store.result = self.offered, result
        self._forget()
        slots.remove(store.folder + "/offer")
        store.save()

    def failed(self) -> None:
        """The medium has refused (OSError): the release is given up until it is offered again."""
        self.refusals += 1
        store = self.store
        if self.offered:
            store.tried, store.result = self.offered, slots.STORAGE
            self._forget()
        try:
            slots.remove(store.folder + "/offer")
            store.save()
        except OSError:
            pass  # the next start goes on with it

    def _forget(self):
        self.offered, self._found, self._digest = 0, None, b""
        self._sizes = [0, 0]

    # --- the end of a trial -----------------------------------------------------------------------------------------

    def _confirm(self, version) -> bool:
        store = self.store
        if not store.trial or version != store.tried:
            return False
        if version in self._final:
            self.refusals += 1
            return False
        packed = slots.read(store.path(store.trial) + _PARTS[0], manifest.MOST_BYTES)
        found = manifest.read(manifest.payload(packed))
        if found.keys:
            store.put_keys(found.keys, sha256(packed).digest())
        store.confirm(found.floor)
        self._final.append(version)
        slots.remove(store.folder + "/offer")
        return False

    def _withdraw(self, version) -> bool:
        store = self.store
        if store.trial and version == store.tried:
            self._end_trial(slots.WITHDRAWN)
            return True
        if version == self.offered:
            self._refuse(slots.WITHDRAWN)
        try:
            return version == store.version and store.withdraw()
        except OSError:
            return True  # in this start; the collector says it again to the next

    def _end_trial(self, result):
        try:
            self.store.roll_back(result)
            slots.remove(self.store.folder + "/offer")
        except OSError:
            pass  # it has ended in this start; the next ones count on


def _digest(path):
    digest = sha256(b"")
    with open(path, "rb") as file:
        while True:
            data = file.read(_READ_BYTES)
            if not data:
                return digest.digest()
            digest.update(data)


def _copy(source, target):
    with open(source, "rb") as file, open(target, "wb") as copy:
        while True:
            data = file.read(_READ_BYTES)
            if not data:
                break
            copy.write(data)
        sync_file(copy)
