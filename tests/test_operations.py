"""What an operator pastes: Prometheus's configuration and alert rules; the log, line by line."""
import ast
import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

OPERATIONS = (ROOT / "oqc" / "help" / "operations.md").read_text(encoding="utf-8")
LEVELS = ("info", "warning", "error", "exception")
# One series says that a runtime is idle, one that a mode has none that is; they end as they began.
FIRING = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'up{{job="oqc",instance="x"}}'
        values: '1x20'
      - series: 'oqc_runtimes{{mode="simulation",state="idle",instance="x"}}'
        values: '1x20'
      - series: 'oqc_runtimes{{mode="verbatim",state="idle",instance="x"}}'
        values: '1 1 _x20'
      - series: 'oqc_runtimes{{mode="verbatim",state="paused",instance="x"}}'
        values: '_ _ 1x20'
    alert_rule_test:
      - {{eval_time: 1m, alertname: OqcNoRuntimeAlive, exp_alerts: []}}
      - {{eval_time: 20m, alertname: OqcDown, exp_alerts: []}}
      - eval_time: 20m
        alertname: OqcNoRuntimeAlive
        exp_alerts:
          - exp_labels: {{mode: verbatim, instance: x}}
            exp_annotations: {{summary: every runtime for verbatim is paused or failing}}
"""


def block(beginning):
    """The block without a name that begins so."""
    found = re.findall(rf"(?ms)^```\n({beginning}.*?)^```$", OPERATIONS)
    assert len(found) == 1, beginning
    return found[0]


RULES = block("groups:")


@pytest.fixture
def promtool(tmp_path):
    """promtool(*arguments): what it says of files in tmp_path, which hold what the manual shows."""
    if not shutil.which("promtool"):
        if os.environ.get("OQC_CI"):
            pytest.fail("promtool is missing")
        pytest.skip("promtool is not installed")
    (tmp_path / "oqc.key").write_text("a-key\n", encoding="utf-8")
    (tmp_path / "oqc-rules.yml").write_text(RULES, encoding="utf-8")
    (tmp_path / "prometheus.yml").write_text(
        block("rule_files:").replace("/etc/prometheus", str(tmp_path)), encoding="utf-8")
    (tmp_path / "firing.yml").write_text(
        FIRING.format(rules=tmp_path / "oqc-rules.yml"), encoding="utf-8")

    def run(*arguments, **options):
        done = subprocess.run(["promtool", *arguments], cwd=tmp_path, capture_output=True,
                              text=True, check=False, timeout=60, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr
    return run


def test_promtool_accepts_the_scrape_section_and_the_rules(promtool):
    said = promtool("check", "config", "prometheus.yml")
    assert "1 rule files found" in said and "is valid prometheus config" in said
    said = promtool("check", "rules", "oqc-rules.yml")
    assert f"{RULES.count('- alert:')} rules found" in said


def test_a_mode_whose_runtimes_are_all_paused_raises_an_alert(promtool):
    """Of a state that no runtime is in there is no series, so that none is 0."""
    assert "SUCCESS" in promtool("test", "rules", "firing.yml")


def test_promtool_accepts_the_metrics(promtool, server):
    assert server.wait(server.add())["status"] == "Success"
    metrics = server.request("GET", "/metrics/").body.decode()
    assert promtool("check", "metrics", input=metrics) == ""


def test_every_metric_of_the_rules_is_one_that_the_server_shows(server):
    assert server.wait(server.add())["status"] == "Success"
    metrics = server.request("GET", "/metrics/").body.decode()
    shown = set(re.findall(r"(?m)^(\w+)[ {]", metrics))
    used = set(re.findall(r"\boqc_\w+", RULES))
    assert len(used) >= 4 and used <= shown
    for text in re.findall(r'\b(?:state|outcome)=~?"([^"]+)"', RULES):
        assert set(text.split("|")) <= {"idle", "busy", "paused", "failing", "failed"}


def test_the_scrape_section_asks_where_the_metrics_are_with_the_key_as_bearer(server):
    section = block("rule_files:")
    path = re.search("metrics_path: (.*)", section)[1]
    assert server.request("GET", path).status == 200
    assert server.request("GET", path, key=None).status == 401
    assert re.search(r"(?m)^ +authorization:\n +credentials_file: ", section)


def log_messages():
    """The text of each log line in the sources, as far as it is written out there."""
    for path in sorted((ROOT / "oqc").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = getattr(node.func.value, "id", "")
                if owner == "log" and node.func.attr in LEVELS:
                    yield node.args[0].value


def test_every_line_of_the_log_is_explained():
    said = re.sub(r"\s+", " ", OPERATIONS)
    messages = list(log_messages())
    assert len(messages) > 25
    for message in messages:
        for words in re.findall(r"[A-Za-z][A-Za-z ,;]{4,}[a-z]", re.sub(r"%[.\w]+", "0", message)):
            assert words in said, message
