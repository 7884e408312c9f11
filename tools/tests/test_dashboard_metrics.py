"""The metrics by second readers: prometheus_client's parser, promtool, and a real Prometheus that scrapes them."""

import contextlib
import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from dashboard_support import command, dashboard
from fleet_support import free_port, wait_for
from prometheus_client.parser import text_string_to_metric_families
from stonechat_tools.dashboard import accounts
from stonechat_tools.dashboard.metrics import METRICS, text_of
from stonechat_tools.dashboard.view import MOST_GROUPS, View
from stonechat_tools.fleet import labels
from stonechat_tools.fleet.labels import Labels
from stonechat_tools.proofs import grafana
from stonechat_tools.proofs.dashboard_fleet import MadeFleet

PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeFleet]:
    fleet = MadeFleet(tmp_path_factory.mktemp("metrics") / "fleet.db", 150)
    fleet.store.put([], [], [("pump-00003", "forged"), ("pump-00003", "forged"), ("x", "malformed")])
    yield fleet
    fleet.close()


def page_of(fleet: MadeFleet) -> str:
    view = View(fleet.store)
    view.poll()
    return text_of(fleet.store, view)


def test_the_metrics_are_what_the_database_has(made: MadeFleet) -> None:
    families = {family.name: family for family in text_string_to_metric_families(page_of(made))}
    assert {name.removesuffix("_total") for name in METRICS} == set(families)
    states = {sample.labels["state"]: sample.value for sample in families["stonechat_devices"].samples}
    seen = [each.state.state for each in made.monitor.states()]
    assert states == {state: seen.count(state) for state in states} and sum(states.values()) == 150
    rejected = {sample.labels["reason"]: sample.value for sample in families["stonechat_messages_rejected"].samples}
    assert rejected["forged"] == 2 and rejected["malformed"] == 1
    (reports,) = families["stonechat_reports"].samples
    assert reports.name == "stonechat_reports_total" and reports.value == made.store.count()
    text = page_of(made)
    assert not any(name in text for name in made.names)  # no label, and no text, for a device


def test_labels_are_few_and_can_hold_anything(tmp_path: Path) -> None:
    fleet = MadeFleet(tmp_path / "fleet.db", 60)
    evil = 'a"b\\c {level="alarm"} 9'
    labels.write(
        fleet.store, {name: Labels("", evil if n == 0 else f"class-{n}") for n, name in enumerate(fleet.names)}
    )
    families = {family.name: family for family in text_string_to_metric_families(page_of(fleet))}
    classes = {sample.labels["class"] for sample in families["stonechat_devices_by_class"].samples}
    assert len(classes) == MOST_GROUPS + 1 and "other" in classes
    labels.write(fleet.store, {name: Labels("", evil) for name in fleet.names})
    families = {family.name: family for family in text_string_to_metric_families(page_of(fleet))}
    assert {sample.labels["class"] for sample in families["stonechat_devices_by_class"].samples} == {evil}
    fleet.close()


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (make setup, as root)")
def test_promtool_has_no_complaint(made: MadeFleet) -> None:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=page_of(made), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and not (done.stdout + done.stderr).strip(), done.stdout + done.stderr


def test_the_metrics_beyond_loopback_want_their_token(made: MadeFleet, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a token of some length\n")
    token.chmod(0o640)  # the group is that of Prometheus
    accounts.put(made.store, "otto", "operator", "correct horse battery")
    with dashboard(Path(made.store.path)) as server:
        assert server.ask("/metrics")[0] == 200
    with dashboard(Path(made.store.path), "--login", "--metrics-token", str(token)) as server:
        assert server.ask("/metrics")[0] == 401
        for wrong in ("Bearer", "Bearer a token", "Basic a token of some length", "Bearer \u00e4"):
            assert server.ask("/metrics", Authorization=wrong)[0] == 401
        status, headers, data = server.ask("/metrics", Authorization="Bearer a token of some length")
        assert status == 200 and headers["content-type"].startswith("text/plain") and b"stonechat_devices{" in data
    with dashboard(Path(made.store.path), "--login") as server:
        assert server.ask("/metrics")[0] == 404
    bad = ((b"short", 0o600, "16 characters"), (b"\xff" * 20, 0o600, "not UTF-8"), (b"a" * 20, 0o644, "chmod"))
    for content, mode, wrong in bad:
        token.write_bytes(content)
        token.chmod(mode)
        done = command("--db", made.store.path, "--metrics-token", str(token), "--listen", "127.0.0.1:0")
        assert done.returncode == 1 and wrong in done.stderr


# --- Grafana ----------------------------------------------------------------------------------------------------------


def test_the_dashboard_is_what_grafanas_sdk_builds() -> None:
    pytest.importorskip("grafana_foundation_sdk")
    assert grafana.FILE.read_text() == grafana.text(), "run python -m stonechat_tools.proofs.grafana"
    found = json.loads(command("grafana").stdout)
    assert found["uid"] == "stonechat-fleet" and len(found["panels"]) == len(grafana.PANELS)
    assert {target["datasource"]["uid"] for panel in found["panels"] for target in panel["targets"]} == {grafana.SOURCE}


@contextlib.contextmanager
def prometheus(folder: Path, port: int) -> Iterator[str]:
    """A real one that scrapes a dashboard at `port` each second -> its address."""
    assert PROMETHEUS is not None
    own = free_port()
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\nscrape_configs:\n- job_name: stonechat\n  static_configs:\n"
        f"  - targets: ['127.0.0.1:{port}']\n"
    )
    call = [PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    call += [f"--web.listen-address=127.0.0.1:{own}", "--log.level=error"]
    with open(folder / "prometheus.log", "w") as log:
        process = subprocess.Popen(call, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{own}"
    finally:
        process.terminate()
        process.wait(30)


def query(url: str, text: str) -> list[dict]:
    with urllib.request.urlopen(f"{url}/api/v1/query?query={urllib.parse.quote(text)}", timeout=30) as answer:
        found = json.load(answer)
    assert found["status"] == "success", found
    return found["data"]["result"]


def heard(url: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(query(url, "count_over_time(stonechat_reports_total[1m]) > 1"))
    return False


@pytest.mark.slow(10)
@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (make setup, as root)")
def test_a_real_prometheus_answers_every_query_of_the_dashboard(made: MadeFleet, tmp_path: Path) -> None:
    with dashboard(Path(made.store.path)) as server, prometheus(tmp_path, server.port) as url:
        assert wait_for(lambda: heard(url), 60), (tmp_path / "prometheus.log").read_text()
        for title, _, _, queries, _ in grafana.PANELS:
            for text, _ in queries:
                found = query(url, text)
                assert found, f"{title}: {text} gives nothing"
                assert all(each["value"][1] not in ("NaN", "+Inf") for each in found), (title, found)
        (devices,) = query(url, "sum(stonechat_devices)")
        assert devices["value"][1] == "150"
        names = {name for each in query(url, '{__name__=~"stonechat_.*"}') for name in each["metric"]}
        assert names <= {
            "__name__",
            "instance",
            "job",
            "state",
            "level",
            "class",
            "model",
            "reason",
            "kind",
            "severity",
        }
