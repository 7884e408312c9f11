"""The channels of the daemon's agent, from the checked configuration: collectors and models that belong together."""

from .. import cose
from ..compat import sha256
from ..errors import ConfigError, ModelError
from ..model import load_model
from . import files
from .tflite_runtime import TfliteRuntime

_TRAINING_MS = 20  # how long a training of the device's own model works at a time,
_TRAINING_REST_MS = 80  # and how long the daemon then waits: a fifth of one core at most
_NOTHING_TO_TRAIN_MS = 60_000


def read_model(path: str, backend: str, what: str = "[model] file"):
    """path -> Model. Raises ConfigError where the file can't be read, ModelError where it is no model."""
    data = files.read_file(path, what)
    try:
        model = load_model(data, TfliteRuntime if backend == "tflite" else None)
        if model.metadata is None:
            raise ModelError("it has no stonechat metadata; make one with `stonechat train`")
    except ModelError as error:
        raise ModelError("%s %s: %s" % (what, path, error))
    return model


def open_collector(config: dict, model, key: bytes, user_id: int | None):
    """The collector that the model's schema asks for. Raises CollectorError, ConfigError, ModelError."""
    from .collector import LinuxCollector
    from .schemas import LINUX_1, LINUX_PROC_1

    wanted = model.metadata.schema_id
    bpf = config["collector"]["bpf"]
    if wanted not in (LINUX_1.id, LINUX_PROC_1.id):
        raise ModelError(
            "[model] file %s is for schema %s; this device has %s and %s"
            % (config["model"]["file"], model.metadata.schema_name, LINUX_1.name, LINUX_PROC_1.name)
        )
    if config["collector"]["services"] and (bpf is False or wanted != LINUX_1.id):
        raise ConfigError(
            "[collector] services needs BPF: a model for %s (this is for %s), and bpf not false"
            % (LINUX_1.name, model.metadata.schema_name)
        )
    if bpf == "auto":
        bpf = wanted == LINUX_1.id
    return LinuxCollector(
        interfaces=config["collector"]["interfaces"] or None,
        peers_secret=cose.derive(key, b"peers"),
        use_bpf=bpf,
        cgroup=config["collector"]["cgroup"] or None,
        own_user_id=user_id,
        disks=config["collector"]["disks"] or None,
        services=config["collector"]["services"],
    )


def own_channel(config: dict, model, key: bytes, log, update=None) -> tuple:
    """[model] personalize: what makes the device's own channel with a model that it trains itself, and the Slot that
    keeps it; (None, None) where it is off, or where the reference model's vendor forbids it. update: the Updater, whose
    final model is the reference, not one on trial. Raises ConfigError."""
    if not config["model"]["personalize"]:
        return None, None
    from .. import own_model
    from .own_model_slot import Slot

    def warn(text: str) -> None:
        log("warning", text)

    file = config["model"]["file"] if update is None else update.final_path
    data = files.read_file(file, "[model] file")
    if own_model.forbidden(data) or update is not None and not update.own_model:
        warn("own model: the vendor of %s forbids it; the reference model alone decides" % model.metadata.name)
        return None, None
    path = config["device"]["state_file"] + ".own-model"
    slot = Slot(path, key, sha256(data).digest()[:8], model.metadata.schema_id, config["device"]["firmware"], warn)

    def make(schema, reference, state):
        windows = config["model"]["personalize_windows"]
        return own_model.OwnModel(schema, reference, state, slot, windows, lambda text: log("info", text))

    return lambda collector, model, state: own_model.OwnChannel(collector, model, state, make), slot


def train(agent) -> int:
    """Give the training of the device's own model its share, where there is one and no window is due -> for how many
    milliseconds the daemon should wait at most after that."""
    if agent.own is not None and agent.due_in_ms > _TRAINING_REST_MS and agent.own.work(_TRAINING_MS):
        return _TRAINING_REST_MS
    return _NOTHING_TO_TRAIN_MS


def open_channels(config: dict, model, collector) -> list:
    """The channels beside the device's own as the agent's `extra`, lasting peers among them. Raises ConfigError,
    ModelError."""
    extra: list = []
    hours = config["collector"]["learn_peers_hours"]
    window_ms = model.metadata.window_ms
    if hours and collector.contacts is not None:
        from .steady_peers import SteadyPeers

        extra.append((SteadyPeers(collector, window_ms, hours, collector.most_peers), None))
    extra += open_counters(config, model) + open_services(config, model, collector)
    if hours and collector.sent is not None:
        from .sent_to_peers import SentToPeers

        extra.append((SentToPeers(collector, window_ms, hours * 3_600_000 // window_ms, collector.most_peers), None))
    if extra:  # now: Agent imports it after the change of user, when only root may read it
        from .. import fusion  # noqa: F401
    return extra


def open_counters(config: dict, model) -> list:
    """The product's own counters: [(collector, model)], or [] where there are none. Raises ConfigError, ModelError."""
    rows = config["counters"]["list"]
    if not rows:
        return []
    from ..custom_counters import from_config
    from .counter_files import CounterFiles

    if not config["counters"]["model"]:
        raise ConfigError("[counters] needs model: the .tflite trained on recordings of these counters")
    own = side_model(config, config["counters"]["model"], "[counters] model", model)
    return [(from_config(config["counters"]["schema"], rows, CounterFiles), own)]


def open_services(config: dict, model, collector) -> list:
    """The services: [(collector, model, name), ...], with one model for all or one for each. Raises ConfigError,
    ModelError."""
    if not config["collector"]["services"]:
        return []
    from .services import model_path, share_budget

    what = "[collector] service_model"
    models: dict = {}
    extra = []
    for each in collector.services:
        path = model_path(config["collector"]["service_model"], each.name)
        if path not in models:
            models[path] = own = side_model(config, path, what, model)
            if own.metadata.schema_id != each.schema.id:
                names = (what, path, own.metadata.schema_name, each.schema.name)
                raise ModelError("%s %s is for schema %s, not %s" % names)
            own.metadata.alarm_rules = share_budget(own.metadata.alarm_rules, len(collector.services))
        extra.append((each, models[path], each.name))
    return extra


def side_model(config: dict, path: str, what: str, model):
    """The model of a channel beside `model`'s, of the same window length. Raises ConfigError, ModelError."""
    own = read_model(path, config["model"]["backend"], what)
    if own.metadata.window_ms != model.metadata.window_ms:
        raise ConfigError(
            "%s has windows of %d ms, the device's model %d ms; they must be the same"
            % (what, own.metadata.window_ms, model.metadata.window_ms)
        )
    return own
