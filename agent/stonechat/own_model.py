"""A device's own model beside the reference model: collected, trained and tried out on the device itself.

    off         an operator has forbidden it
    collecting  windows that the reference model finds ordinary go into a bounded memory; they never leave the device
    training    own_model_training.py makes a model of them, a few milliseconds at a time (`work`)
    on trial    the model scores later windows and decides nothing. It is adopted where its evidence stays low in all of
                them, and made anew where it does not
    deciding    the worst of both verdicts counts: what one of them finds, the other does not hide

The reference model never stops. Where the device was infected before its first window, its own model has learned the
infection as normal, and only the reference can see it. Where the device's normal moves (the command `calibrate`, a new
firmware, another reference model or schema) its own model is dropped and made again.
"""

from array import array
from struct import calcsize, pack, unpack_from

from .compat import const, ticks_add, ticks_diff, ticks_ms
from .detection import NORMAL, Verdict
from .errors import StonechatError
from .features import Normalization
from .int8 import tflite
from .model import load_model
from .own_model_training import LEAST_WINDOWS, Training
from .steady import SteadyChannel, SteadyScorer

OFF = const(0)
COLLECTING = const(1)
TRAINING = const(2)
ON_TRIAL = const(3)
DECIDING = const(4)
STATES = ("off", "collecting", "training", "on trial", "deciding")

FORBIDDEN = "stonechat.no-own-model"  # a metadata buffer of this name in a reference model: its vendor forbids it
WINDOWS = const(2000)
_TRIAL_SHARE = const(4)  # of the windows collected: a quarter as many more are the trial
_ADOPTED_BELOW_Q8 = const(192)  # of the evidence; 256 is an alarm
_HEAD = "<BHI"  # state, how often a model was refused, windows of the trial passed
_REFUSED_MAX = const(65535)
_OFF = b"off"  # section of the state: an operator has forbidden it


def forbidden(data) -> bool:
    """data: a reference model's file -> whether its vendor forbids own models."""
    return tflite.read(data).metadata(FORBIDDEN) is not None


class OwnModel:
    """schema, reference: of the device's collector, and the Scorer of its reference model; state: keeps what the own
    model's scorer learns; slot: keeps windows and model (linux/own_model_slot.py), None keeps them in memory; windows:
    how many to collect; say(text): for a log.

    `phase` is one of the above, `scorer` that of the own model while it is on trial or decides."""

    def __init__(self, schema, reference, state, slot=None, windows: int = WINDOWS, say=None) -> None:
        self._schema = schema
        self._reference = reference
        self._state = _Sections(state)
        self._slot = slot
        self.wanted = max(windows, LEAST_WINDOWS)
        self._trial = self.wanted // _TRIAL_SHARE
        self._say = say or _silent
        n = len(schema)
        self._normalization = Normalization(schema, reference.meta.normalization)
        self._f_q8 = [0] * n
        self._fused = Verdict(n)
        self._data = b""
        self._changed = False
        self.refused = 0
        self.suspended = False  # while another reference model is on trial: it does not judge, collect or train
        self._clear(COLLECTING)
        if self._state.get(_OFF):
            self._clear(OFF)
        else:
            self._restore()

    def _clear(self, phase) -> None:
        self.phase = phase
        self.scorer: SteadyScorer | None = None
        self._rows = array("H")
        self._steps = None
        self._training: Training | None = None
        self._passed = 0
        self._data = b""

    @property
    def status(self) -> tuple:
        """For the status message: (phase, windows so far, windows wanted, models refused, digest of the own model)."""
        done, wanted = len(self._rows) // len(self._schema), self.wanted
        if self.phase == ON_TRIAL:
            done, wanted = self._passed, self._trial
        if self.phase in (OFF, DECIDING):
            done = wanted = 0
        digest = self.scorer.model.digest if self.scorer else b""
        return self.phase, done, wanted, self.refused, digest

    @property
    def news(self) -> bool:
        """Whether the phase has changed since this was last asked for: then it is to be saved and reported."""
        changed, self._changed = self._changed, False
        return changed

    def _enter(self, phase, text) -> None:
        self.phase = phase
        self._changed = True
        self._say("own model: " + text)

    # --- windows ------------------------------------------------------------------------------------------------------

    def judge(self, window, verdict):
        """window: the Window just ended; verdict: the reference model's -> the Verdict that counts."""
        if verdict is None:
            return None
        own = None
        if not (verdict.learning or self.suspended):
            try:
                own = self._judge(window, verdict)
            except Exception as error:  # noqa: BLE001 - whatever it is, the reference model goes on
                self._refuse(repr(error))
        return _worst(self._fused, verdict, own)

    def _judge(self, window, verdict):
        """-> the own model's Verdict where it decides, else None."""
        if self.phase == COLLECTING:
            if verdict.level == NORMAL and not getattr(verdict, "steady", False):
                self._collect(window)
        elif self.scorer is not None:
            own = self.scorer.score(window.deltas, window.elapsed_ms)
            if self.phase == DECIDING:
                return own
            self._try_out(own, verdict)
        return None

    def _collect(self, window) -> None:
        self._normalization.fill_q8(window.deltas, window.elapsed_ms, self._reference.window_ms, self._f_q8)
        self._rows.extend(array("H", self._f_q8))
        if len(self._rows) >= self.wanted * len(self._schema):
            self._train()

    def _try_out(self, own, verdict) -> None:
        """One window of the trial. One under the reference model's suspicion proves nothing either way."""
        if verdict.level != NORMAL:
            self.clear_evidence()
        elif own.evidence_q8 >= _ADOPTED_BELOW_Q8:
            self._refuse("it found windows unusual that it was not trained on")
        else:
            self._passed += 1
            if self._passed >= self._trial:
                self.clear_evidence()
                self._enter(DECIDING, "adopted after %d silent windows; decides beside the reference" % self._passed)

    def _refuse(self, why) -> None:
        self.refused = min(self.refused + 1, _REFUSED_MAX)
        self._clear(COLLECTING)
        self._enter(COLLECTING, "refused, because %s; collecting %d windows again" % (why, self.wanted))

    def clear_evidence(self) -> None:
        """An operator marked it as normal."""
        if self.scorer is not None:
            self.scorer.clear_evidence()

    # --- training -----------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        reference = self._reference
        self._training = Training(
            self._rows,
            self._schema,
            reference.window_ms,
            name=reference.meta.name[:200] + "-own",
            version=reference.meta.version,
            alarm_rules=reference.meta.alarm_rules,
            origin=[("reference", reference.model.digest)],
        )
        self._steps = self._training.steps()
        self._enter(TRAINING, "training on %d windows" % self.wanted)

    def work(self, limit_ms: int) -> bool:
        """Take steps of the training for about limit_ms -> whether there is more to do. A step takes some
        milliseconds."""
        if self._steps is None or self.suspended:
            return False
        end_ms = ticks_add(ticks_ms(), limit_ms)
        try:
            while ticks_diff(end_ms, ticks_ms()) > 0:
                next(self._steps)
            return True
        except StopIteration:
            data = self._training.data  # pyright: ignore[reportOptionalMemberAccess]
            left_out = self._training.figures["trimmed_windows"]  # pyright: ignore[reportOptionalMemberAccess]
            self._clear(ON_TRIAL)
            try:
                self._open(data, False)
            except StonechatError as error:
                self._refuse(str(error))
                return False
            self._enter(
                ON_TRIAL,
                "trained on %d windows (%d left out as unusual); on trial for %d more"
                % (self.wanted, left_out, self._trial),
            )
        except Exception as error:  # noqa: BLE001 - it would come again at each call, and stop what calls this
            self._refuse(str(error) if isinstance(error, StonechatError) else repr(error))
        return False

    def _open(self, data, keep: bool) -> None:
        """keep: what its scorer had learned before a restart. Raises ModelError."""
        if not keep:
            self._state.forget(self._schema.id)
        self.scorer = SteadyScorer(load_model(data), self._schema, self._state)
        self._data = data

    def use_reference(self, scorer) -> None:
        """scorer: that of the reference model, which is another from now on."""
        self._reference = scorer
        self._normalization = Normalization(self._schema, scorer.meta.normalization)

    # --- an operator's word, a new normal -----------------------------------------------------------------------------

    def restart(self) -> None:
        """Drop the own model and make it again."""
        if self.phase != OFF:
            self.allow()

    def allow(self) -> None:
        """The same, also where it was forbidden."""
        self._state.put(_OFF, b"")
        self._clear(COLLECTING)
        self._enter(COLLECTING, "collecting %d windows" % self.wanted)

    def forbid(self) -> None:
        """Drop the own model and everything collected; keep it so until allow(), whatever the reference model is."""
        self._state.put(_OFF, b"\1")
        self._clear(OFF)
        self._enter(OFF, "forbidden by an operator; what was collected is deleted")

    # --- across restarts ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write it down. Raises StateError where the medium refuses."""
        if self.scorer is not None:
            self.scorer.save()
        if self._slot is not None:
            phase = COLLECTING if self.phase == TRAINING else self.phase
            body = self._data or bytes(self._rows)
            self._slot.save(pack(_HEAD, phase, self.refused, self._passed) + body)

    def _restore(self) -> None:
        content = self._slot.load() if self._slot is not None else b""
        if len(content) < calcsize(_HEAD):
            self._say("own model: collecting %d windows" % self.wanted)
            return
        phase, self.refused, passed = unpack_from(_HEAD, content, 0)
        body = content[calcsize(_HEAD) :]
        if phase == COLLECTING:
            whole = len(body) // (2 * len(self._schema)) * 2 * len(self._schema)
            self._rows = array("H", body[:whole])
            if len(self._rows) >= self.wanted * len(self._schema):
                self._rows = self._rows[-self.wanted * len(self._schema) :]
                self._train()
        elif phase == OFF:
            if self._state.get(_OFF) is None:  # the state is lost; that it is forbidden is not
                self.forbid()
        else:
            try:
                self._open(body, True)
                self.phase = DECIDING if phase == DECIDING else ON_TRIAL
                self._passed = passed
            except StonechatError as error:
                self._refuse(str(error))


class OwnChannel(SteadyChannel):
    """A Channel whose verdicts are those of the reference model and of the device's own together. make(schema,
    reference, state) -> OwnModel."""

    def __init__(self, collector, model, state, make) -> None:
        SteadyChannel.__init__(self, collector, model, state)
        self.own: OwnModel = make(collector.schema, self.scorer, state)

    def end_window(self, now_ms: int):
        return self.own.judge(self.window, SteadyChannel.end_window(self, now_ms))

    def save(self, state) -> None:
        """Into the state; Agent.save() has the own model's file written after that."""
        SteadyChannel.save(self, state)
        if self.own.scorer is not None:
            self.own.scorer.save()


class _Sections:
    """The sections of a State under names of their own: two scorers of one schema don't share what they learn."""

    def __init__(self, state) -> None:
        self._state = state

    def get(self, section, default=None):
        return self._state.get(b"own" + section, default)

    def put(self, section, value) -> None:
        self._state.put(b"own" + section, value)

    def forget(self, schema_id) -> None:
        for name in (b"norm", b"cal", b"new"):
            self._state.put(b"own" + name + schema_id, b"")


def _worst(fused, reference, own):
    """Fill `fused` with the reference model's verdict, or with the own model's where that is worse."""
    lead = reference
    if own is not None and (own.level, own.evidence_q8, own.surprise_q8) > (
        reference.level,
        reference.evidence_q8,
        reference.surprise_q8,
    ):
        lead = own
    fused.parts[:] = lead.parts
    fused.x[:] = lead.x
    fused.score_q8 = lead.score_q8
    fused.surprise_q8 = lead.surprise_q8
    fused.evidence_q8 = lead.evidence_q8
    fused.learning = reference.learning
    fused.unfit = reference.unfit
    fused.steady = getattr(reference, "steady", False) or own is not None and own.steady
    fused.changed = lead.level != fused.level
    fused.level = lead.level
    return fused


def _silent(text) -> None:
    """Nobody listens."""
