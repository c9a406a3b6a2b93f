"""Collector, Prometheus and Grafana are set up for what Baton really exports."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from baton_router.outcome import outcomes
from tests.deploy import files
from tests.deploy.files import ROOT

DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
RULES = ROOT / "deploy/prometheus/rules.yml"
PROMETHEUS = ROOT / "deploy/prometheus/prometheus.yml"
SUFFIXES = {"Counter": ("",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def exported() -> dict[str, set[str]]:
    """Series that Baton's code makes, with their labels."""
    found: dict[str, set[str]] = {}
    for source in [*ROOT.glob("services/**/*.py"), *ROOT.glob("shared/**/*.py")]:
        text = source.read_text(encoding="utf-8")
        if "prometheus_client" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SUFFIXES):
                continue
            first = node.args[0] if node.args else None
            if not (isinstance(first, ast.Constant) and str(first.value).startswith(("baton_", "gen_ai_"))):
                continue
            labels = {
                str(item.value)
                for given in [*node.args[2:3], *(word.value for word in node.keywords if word.arg == "labelnames")]
                if isinstance(given, ast.List | ast.Tuple)
                for item in given.elts
                if isinstance(item, ast.Constant)
            }
            for suffix in SUFFIXES[node.func.id]:
                found[f"{first.value}{suffix}"] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in load("deploy/prometheus/rules.yml")["groups"] for rule in group["rules"]]


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        inner for panel in dashboard["panels"] for inner in (panel, *panel.get("panels", [])) if inner["type"] != "row"
    ]


def expressions() -> list[tuple[str, str]]:
    """(where, PromQL) of all rules and dashboards."""
    found = [(rule.get("record") or rule["alert"], rule["expr"]) for rule in rules()]
    for path in DASHBOARDS:
        for panel in panels(json.loads(path.read_text(encoding="utf-8"))):
            found += [
                (f"{path.name}: {panel['title']}", target["expr"])
                for target in panel.get("targets", [])
                if "expr" in target
            ]
    return found


def series(expression: str) -> set[str]:
    """Baton's series that an expression names."""
    without_strings = re.sub(r'"[^"]*"', '""', expression)
    return set(re.findall(r"\b(?:\w+:)?(?:baton|gen_ai)[\w:]*", without_strings))


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_rules_and_dashboards_name_series_that_exist(where: str, expression: str) -> None:
    assert series(expression) <= set(exported()) | recorded()
    assert series(expression) or "up{" in expression


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_rules_and_dashboards_name_labels_that_exist(where: str, expression: str) -> None:
    known = set().union(*exported().values()) | {"job", "instance"}
    named = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|==?)\s*\"", expression))
    for listed in re.findall(r"\b(?:by|without|ignoring|on)\s*\(([^)]*)\)", expression):
        named |= {label.strip() for label in listed.split(",") if label.strip()}
    assert named <= known


def test_rules_name_outcomes_that_exist() -> None:
    for rule in rules():
        for names in re.findall(r'baton_requests_total\{outcome=~?"([^"]*)"', rule["expr"]):
            assert set(names.split("|")) <= set(outcomes())


def test_alerts_say_what_is_wrong_and_how_bad() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["annotations"]["summary"]
            assert rule["labels"]["severity"] in {"warning", "critical"}
            assert rule["for"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, of Prometheus, is not installed")
def test_rules_compute_and_alert_as_meant() -> None:
    for arguments in (["check", "config", str(PROMETHEUS)], ["test", "rules", "tests/deploy/rules_test.yml"]):
        done = subprocess.run(["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_reads_every_service() -> None:
    jobs = {job["job_name"]: job for job in load("deploy/prometheus/prometheus.yml")["scrape_configs"]}
    services = files.of_baton(files.services(*files.LAYERS))
    for name, service in services.items():
        tier = name.removesuffix("-gpu")
        (discovery,) = jobs[tier]["dns_sd_configs"]
        assert discovery["names"] == [tier]
        assert service["environment"]["BATON_METRICS_LISTEN"] == f"0.0.0.0:{discovery['port']}"
    for rule in rules():
        for names in re.findall(r'job=~?"([^"]*)"', rule["expr"]):
            assert set(names.split("|")) <= set(jobs)


def test_prometheus_finds_its_rules_in_the_container() -> None:
    assert load("deploy/prometheus/prometheus.yml")["rule_files"] == [RULES.name]
    volumes = files.services(*files.LAYERS)["prometheus"]["volumes"]
    assert f"./{PROMETHEUS.parent.relative_to(ROOT)}:/etc/prometheus:ro" in volumes


@pytest.mark.parametrize("name", ["collector", "prometheus", "grafana"])
def test_mounted_files_exist(name: str) -> None:
    for volume in files.services(*files.LAYERS)[name]["volumes"]:
        source = volume.partition(":")[0]
        assert not source.startswith(".") or (ROOT / source).exists()


def test_collector_takes_traces_from_baton_and_gives_them_to_jaeger() -> None:
    config = load("deploy/collector/config.yaml")
    pipeline = config["service"]["pipelines"]["traces"]
    for kind in ("receivers", "processors", "exporters"):
        assert set(pipeline[kind]) == set(config[kind])
    assert set(config["service"]["extensions"]) == set(config["extensions"])
    assert pipeline["processors"] == ["memory_limiter", "batch"]
    assert config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"] == "0.0.0.0:4317"
    (exporter,) = config["exporters"].values()
    assert exporter["endpoint"] == "jaeger:4317"
    reader = config["service"]["telemetry"]["metrics"]["readers"][0]["pull"]["exporter"]["prometheus"]
    jobs = {job["job_name"]: job for job in load("deploy/prometheus/prometheus.yml")["scrape_configs"]}
    assert jobs["collector"]["static_configs"] == [{"targets": [f"collector:{reader['port']}"]}]


def test_grafana_is_provisioned_with_what_its_dashboards_use() -> None:
    sources = load("deploy/grafana/provisioning/datasources/baton.yaml")["datasources"]
    assert {source["type"]: source["url"] for source in sources} == {
        "prometheus": "http://prometheus:9090",
        "jaeger": "http://jaeger:16686",
    }
    known = {source["uid"] for source in sources}
    assert DASHBOARDS
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text(encoding="utf-8"))
        for panel in panels(dashboard):
            used = [panel.get("datasource"), *(target.get("datasource") for target in panel.get("targets", []))]
            assert {source["uid"] for source in used if source} <= known, panel["title"]


def rows(dashboard: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Panels by the title of the row that they are in."""
    found: dict[str, list[dict[str, Any]]] = {}
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            found[panel["title"]] = []
        else:
            found[list(found)[-1]].append(panel)
    return found


def test_the_dashboard_has_a_row_for_each_tier() -> None:
    (path,) = DASHBOARDS
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    by_row = rows(dashboard)
    assert list(by_row) == ["Network or compute?", "Router", "Decode", "Prefill", "Cache"]
    for tier in ("Decode", "Prefill"):
        # Both tiers run an engine and export its metrics.
        named = [target["expr"] for panel in by_row[tier] for target in panel["targets"]]
        engines = [expr for expr in named if re.search("baton_(engine|kv|preemptions)", expr)]
        assert len(engines) >= 5
        assert all(f'job="{tier.lower()}"' in expr for expr in engines)
    glance = [target["expr"] for panel in by_row["Network or compute?"] for target in panel["targets"]]
    assert any("baton_ledger_hidden_transfer_seconds" in expr for expr in glance)
    assert "baton:ledger_first_token_seconds:mean_by_hop_and_kind_5m" in glance


def test_panels_do_not_overlap() -> None:
    for path in DASHBOARDS:
        taken: dict[tuple[int, int], str] = {}
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            place = panel["gridPos"]
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    assert x < 24
                    assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_panels_have_ids_of_their_own() -> None:
    for path in DASHBOARDS:
        ids = [panel["id"] for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]]
        assert len(ids) == len(set(ids))


def test_grafana_finds_its_dashboards() -> None:
    (provider,) = load("deploy/grafana/provisioning/dashboards/baton.yaml")["providers"]
    grafana = files.services(*files.LAYERS)["grafana"]
    where = provider["options"]["path"]
    assert f"./deploy/grafana/dashboards:{where}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.removeprefix(f"{where}/") in {path.name for path in DASHBOARDS}
    uids = [json.loads(path.read_text(encoding="utf-8"))["uid"] for path in DASHBOARDS]
    assert len(uids) == len(set(uids))
