"""Point 7: metrics are defined once, documented, and used under no other name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from restoration.limits.owner_classes import OwnerClass, owner_class
from restoration.observability.metrics import METRICS, Kind

DOCS = Path(__file__).parents[2] / "docs"
RULES = DOCS / "monitoring" / "alerts.yml"
RULE_TESTS = DOCS / "monitoring" / "alerts_test.yml"
DASHBOARD = DOCS / "monitoring" / "grafana-dashboard.json"
SUFFIXES = {Kind.HISTOGRAM: ("_bucket", "_count", "_sum")}
# The labels that Ray and the exposition format put on every series.
RAYS_LABELS = {"NodeAddress", "WorkerId", "le"}


def _series() -> dict[str, set[str]]:
    """Return each series that can be queried, with its labels."""
    return {
        metric.exported + suffix: {*metric.labels, *RAYS_LABELS}
        for metric in METRICS
        for suffix in SUFFIXES.get(metric.kind, ("",))
    }


def _alerts() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(RULES.read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def _expressions() -> Iterator[str]:
    for rule in _alerts():
        yield rule["expr"]
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


@pytest.mark.metrics
def test_the_table_is_the_definitions() -> None:
    """docs/metrics.md has one row for each metric, as it is defined."""
    rows = re.findall(r"^\| `(ray_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", _text("metrics.md"), re.M)
    assert rows == [
        (m.exported, m.kind.value, ", ".join(f"`{label}`" for label in m.labels), m.meaning)
        for m in METRICS
    ]


def _text(name: str) -> str:
    return (DOCS / name).read_text()


@pytest.mark.metrics
@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: Any) -> None:
    """Counters end in _total, units are base units in the name, and a histogram has buckets."""
    assert re.fullmatch(r"restore(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert not re.search(r"_(ms|s|mb|minutes)(_total)?$", metric.name)
    assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
    assert list(metric.buckets) == sorted(metric.buckets)
    assert "owner" not in metric.labels, "there is one value for each owner"


@pytest.mark.metrics
def test_each_expression_uses_metrics_and_labels_that_exist() -> None:
    """In alerts and dashboard, each name with our metrics' form is defined."""
    known, used = _series(), set[str]()
    for expression in _expressions():
        names = re.findall(r"\bray_\w+", expression)
        assert names, expression
        assert set(names) <= known.keys(), expression
        used |= set(names)
        for name, matchers in re.findall(r"\b(ray_\w+)\{(.*?)\}", expression):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= known[name], expression
        grouping = re.findall(r"by \(([^)]*)\)", expression)
        for label in (label.strip() for labels in grouping for label in labels.split(",")):
            assert all(label in known[name] for name in names), expression
    unseen = {m.exported for m in METRICS if not any(name.startswith(m.exported) for name in used)}
    assert not unseen, "nobody looks at these"


@pytest.mark.metrics
def test_each_alert_has_its_page() -> None:
    """`runbook_url` leads to a section of docs/alerts.md, and every section has an alert."""
    sections = re.findall(r"^## (\w+)$", _text("alerts.md"), re.M)
    assert sections == [rule["alert"] for rule in _alerts()]
    for rule in _alerts():
        assert rule["annotations"]["runbook_url"] == f"docs/alerts.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in {"page", "ticket"}


def _promtool(*arguments: str | Path) -> None:
    """Run promtool, which must report no error."""
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.metrics
def test_promtool_accepts_the_rules() -> None:
    """Prometheus' own checker reads every rule."""
    _promtool("check", "rules", RULES)


@pytest.mark.metrics
def test_promtool_accepts_what_the_dashboard_asks(tmp_path: Path) -> None:
    """Every panel's expression is valid in Prometheus, with Grafana's variables filled in."""
    filled = [re.sub(r"\$(__)?\w+", "5m", expression) for expression in _expressions()]
    rules = [{"record": f"panel:{n}", "expr": each} for n, each in enumerate(filled)]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    _promtool("check", "rules", file)


@pytest.mark.metrics
def test_each_alert_fires_when_it_should_and_says_what_is_so() -> None:
    """The series are made up; the file of tests has them and the expected messages."""
    _promtool("test", "rules", RULE_TESTS)


@pytest.mark.metrics
def test_no_alert_is_without_its_tests() -> None:
    """Each fires on some made-up series, and stays silent on those of a healthy fleet."""
    tests = yaml.safe_load(RULE_TESTS.read_text())["tests"]
    healthy = {case["alertname"] for case in tests[0]["alert_rule_test"]}
    assert not any(case.get("exp_alerts") for case in tests[0]["alert_rule_test"])
    cases = [case for test in tests for case in test["alert_rule_test"]]
    firing = {case["alertname"] for case in cases if case.get("exp_alerts")}
    assert healthy == firing == {rule["alert"] for rule in _alerts()}


@pytest.mark.metrics
def test_each_planted_series_is_one_that_is_exported() -> None:
    """Metric and labels must exist: a rule on a series that is never exported is useless."""
    known = _series()
    for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]:
        for each in test["input_series"]:
            series = re.fullmatch(r"(\w+)\{(.*)\}", each["series"])
            assert series is not None
            name, labels = series.groups()
            assert set(re.findall(r"(\w+)=", labels)) <= known[name], each["series"]


@pytest.mark.metrics
@pytest.mark.parametrize(
    ("owner", "expected"),
    [
        ("auth0|5f7c8ec7c33c6c004bbafe82", OwnerClass.PERSON),
        ("google-oauth2|1234", OwnerClass.PERSON),
        ("jZkM3rVt@clients", OwnerClass.MACHINE),
        ("batch", OwnerClass.OTHER),
        ("", OwnerClass.OTHER),
    ],
)
def test_an_owners_class_is_in_its_name(owner: str, expected: OwnerClass) -> None:
    """Auth0's names show people and machines; all others are `other`."""
    assert owner_class(owner) is expected
