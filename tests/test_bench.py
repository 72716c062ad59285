"""scripts/bench.py measures what it says: a short run of it, and all of it where there is time."""
import json
import os
import pty
import subprocess
import sys

import pytest
from conftest import ROOT

BENCH = [sys.executable, str(ROOT / "scripts" / "bench.py")]


def bench(*arguments, **options):
    return subprocess.run([*BENCH, *arguments], capture_output=True, text=True, check=False,
                          timeout=600, **options)


def check(done, file):
    """{name: (value, unit)} of a run whose table and file say the same."""
    assert (done.returncode, done.stderr) == (0, "")
    head, *table = done.stdout.splitlines()
    assert head.startswith(f"{os.cpu_count()} cores, ")
    figures = json.loads(file.read_text())
    assert [line.split("  ")[0] for line in table] == [figure["name"] for figure in figures]
    assert all(line.endswith(" " + figure["unit"]) for line, figure in zip(table, figures))
    return {figure["name"]: (figure["value"], figure["unit"]) for figure in figures}


@pytest.mark.slow                   # five seconds
def test_a_short_run_prints_a_table_and_writes_the_same_figures(tmp_path):
    file = tmp_path / "figures.json"
    parts = "batch,results,client,lines,simulation"
    found = check(bench("--quick", "--only", parts, "--json", str(file)), file)
    assert {unit for _, unit in found.values()} == {
        "jobs/s", "records/s", "MiB", "times", "ms", "us", "ns", "pulses/s"}
    assert all(value > 0 for value, _ in found.values())
    values = {name: value for name, (value, _) in found.items()}
    assert values["lines: add to start, median"] <= values["lines: add to start, p99"]
    a_pulse = values["simulation of 10, a pulse"]       # in ns; the other is in us
    assert values["simulation of 10 pulses"] * 100 == pytest.approx(a_pulse)


def test_a_terminal_shows_how_far_it_is():
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        subprocess.run([*BENCH, "--only", "simulation", "--quick"], check=True,
                       stderr=theirs, stdout=subprocess.DEVNULL)
        os.close(theirs)
        shown = b""
        while b"a pulse" not in shown:
            shown += terminal.read(65536)
    assert shown.startswith(
        b"\r\x1b[K1/1 simulation\r\x1b[K1/1 simulation: simulation of 10 pulses")


def test_help_names_the_parts_and_an_unknown_one_is_refused():
    told = bench("--help")
    assert told.returncode == 0
    for part in ("batch", "listing", "results", "client", "growth", "lines", "waits", "starts",
                 "simulation"):
        assert f"\n  {part} " in told.stdout
    refused = bench("--only", "batch,sped")
    assert refused.returncode == 2 and "no part is called sped" in refused.stderr


def test_a_server_that_does_not_start_is_said_in_a_line():
    done = bench("--only", "batch", "--oqc", "/bin/false")
    assert done.returncode == 1 and done.stderr == "/bin/false --port 0 does not start\n"


@pytest.mark.slow
def test_all_of_it(tmp_path):
    file = tmp_path / "figures.json"
    found = check(bench("--json", str(file)), file)
    assert found["peak of its memory, above idle"][0] < 16
    assert found["peak of memory for results, above idle"][0] < 16
    assert {"jobs/s", "MiB", "us", "times"} <= {unit for _, unit in found.values()}


@pytest.mark.slow                   # ten seconds
def test_size_compares_a_large_store_with_a_small_one():
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "size.py"), "5000"], check=True,
                          capture_output=True, text=True, timeout=300)
    head, *table = done.stdout.splitlines()
    assert head.endswith("; 5,000 stored and 5,000 waiting")
    names = [line.split("  ")[0] for line in table]
    for name in ("/status/, against few", "list, page of 50: ", "cancel by tag of 2,500",
                 "prune of 5,000", "the file after it, of before"):
        assert any(found.startswith(name) for found in names), name
