"""Build the Grafana dashboard of the fleet's metrics, dashboard/grafana.json, with Grafana's own SDK.

python -m stonechat_tools.proofs.grafana            writes it
python -m stonechat_tools.proofs.grafana --check    1 if it would be another
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from stonechat_tools import dashboard

FILE = Path(dashboard.__file__).with_name("grafana.json")
SOURCE = "${datasource}"
# title, unit, kind, (query, legend) ..., width of 24
PANELS: tuple[tuple[str, str, str, tuple[tuple[str, str], ...], int], ...] = (
    ("Devices", "none", "stat", (("sum(stonechat_devices)", ""),), 4),
    ("Silent, gone or lying", "none", "stat", (('sum(stonechat_devices{state=~"silent|gone|lying"})', ""),), 5),
    ("In alarm", "none", "stat", (('sum(stonechat_devices_by_level{level="alarm"})', ""),), 5),
    ("Open incidents", "none", "stat", (("sum(stonechat_incidents_open) or vector(0)", ""),), 5),
    ("Collector heard", "s", "stat", (("max(stonechat_collector_heard_seconds)", ""),), 5),
    ("Devices by presence", "none", "lines", (("sum by (state) (stonechat_devices)", "{{state}}"),), 12),
    ("Devices by level", "none", "lines", (("sum by (level) (stonechat_devices_by_level)", "{{level}}"),), 12),
    (
        "Share in alarm, by class",
        "percentunit",
        "lines",
        (
            (
                'sum by (class) (stonechat_devices_by_class{level="alarm"})'
                " / on (class) sum by (class) (stonechat_devices_by_class)",
                "{{class}}",
            ),
        ),
        12,
    ),
    (
        "Share in alarm, by model",
        "percentunit",
        "lines",
        (
            (
                'sum by (model) (stonechat_devices_by_model{level="alarm"})'
                " / on (model) sum by (model) (stonechat_devices_by_model)",
                "{{model}}",
            ),
        ),
        12,
    ),
    ("Reports a second", "reqps", "lines", (("sum(rate(stonechat_reports_total[5m]))", "reports"),), 12),
    (
        "Refused messages a second",
        "reqps",
        "lines",
        (("sum by (reason) (rate(stonechat_messages_rejected_total[5m]))", "{{reason}}"),),
        12,
    ),
    (
        "Open incidents",
        "none",
        "lines",
        (("sum by (kind, severity) (stonechat_incidents_open)", "{{kind}}, {{severity}}"),),
        12,
    ),
    (
        "Lost reports",
        "none",
        "lines",
        (
            ("sum(stonechat_reports_lost_total)", "announced by the devices"),
            ("sum(stonechat_reports_unexplained)", "unexplained"),
        ),
        12,
    ),
)


def text() -> str:
    from grafana_foundation_sdk.builders import dashboard as build
    from grafana_foundation_sdk.builders.common import VizTooltipOptions
    from grafana_foundation_sdk.builders.prometheus import Dataquery
    from grafana_foundation_sdk.builders.stat import Panel as Stat
    from grafana_foundation_sdk.builders.timeseries import Panel as Lines
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.common import BigValueGraphMode, TooltipDisplayMode
    from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableHide

    source = DataSourceRef(type_val="prometheus", uid=SOURCE)
    made = (
        build.Dashboard("stonechat fleet")
        .uid("stonechat-fleet")
        .tags(["stonechat", "iot"])
        .description("A fleet of devices that score themselves; see `stonechat dashboard` for each device.")
        .refresh("1m")
        .time("now-24h", "now")
        .timezone("browser")
        .with_variable(
            build.DatasourceVariable("datasource").label("Data source").type("prometheus").hide(VariableHide.DONT_HIDE)
        )
    )
    for title, unit, kind, queries, width in PANELS:
        panel: Any = (
            Stat().graph_mode(BigValueGraphMode.AREA)
            if kind == "stat"
            else Lines().tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI)).fill_opacity(10)
        )
        panel = panel.title(title).unit(unit).datasource(source).span(width).height(4 if kind == "stat" else 8).min(0)
        for n, (query, legend) in enumerate(queries):
            panel = panel.with_target(Dataquery().expr(query).legend_format(legend).ref_id("ABC"[n]).datasource(source))
        made = made.with_panel(panel)
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    found = text()
    json.loads(found)
    if parser.parse_args().check:
        return int(FILE.read_text() != found)
    FILE.write_text(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
