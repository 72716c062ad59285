"""scripts/compare.py prints what it measured. Here it runs with a wrk that only says that it ran,
and without a network."""
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

COMPARE = ROOT / "scripts" / "compare.py"
SAID = "    99%    1.50ms\n123 requests in 1.00s\nRequests/sec:    250.00\n"
ROWS = [
    "start to first answer, ms", "memory after start, MiB",
    "echo jobs added one by one and ended, /s",
    "add, kept alive, 1 client, /s", "add, kept alive, 16 clients, /s",
    "add, kept alive, 16 clients, p99 ms", "add, kept alive, 64 clients, /s",
    "add, a connection each, 16 clients, /s",
    "get, kept alive, 16 clients, /s", "get, a connection each, 16 clients, /s",
]


def program(path, *lines):
    """Write a program of sh."""
    path.write_text("\n".join(("#!/bin/sh", *lines, "")), encoding="ascii")
    path.chmod(0o755)


@pytest.fixture(name="compare")
def module():
    """scripts/compare.py as a module."""
    spec = importlib.util.spec_from_file_location("compare", COMPARE)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def run(tmp_path):
    """run(said, *arguments): compare.py where wrk says only this, or is not there if it is None.
    The environment of the peers is there already."""
    programs = tmp_path / "programs"
    programs.mkdir()
    environment = tmp_path / "peers" / "bin"
    environment.mkdir(parents=True)
    (environment / "python").symlink_to(sys.executable)

    def start(said, *arguments):
        if said is not None:
            (programs / "said").write_text(said, encoding="ascii")
            program(programs / "wrk",
                    f'echo "$CLOSE $*" >>{programs}/ran', f"/bin/cat {programs}/said")
        return subprocess.run(
            [sys.executable, str(COMPARE), "--venv", "peers", *arguments],
            cwd=tmp_path, check=False, capture_output=True, text=True, timeout=120,
            env={**os.environ, "PATH": str(programs)})
    return start


@pytest.mark.slow                   # five seconds
def test_a_run_prints_a_row_for_each_figure_and_writes_all_of_them(run, tmp_path):
    done = run(SAID, "--rounds", "2", "--seconds", "7", "--peers", "stdlib",
               "--json", "figures.json")
    assert (done.returncode, done.stderr) == (0, "")
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["oqc", "stdlib", "oqc", "against", "each"]
    assert [line[:42].rstrip() for line in lines] == ROWS
    figures = json.loads((tmp_path / "figures.json").read_text("ascii"))
    assert list(figures) == ROWS
    for by_name in figures.values():
        assert {name: len(values) for name, values in by_name.items()} == {"oqc": 2, "stdlib": 2}
        assert all(value > 0 for values in by_name.values() for value in values)
    both = {"oqc": [250, 250], "stdlib": [250, 250]}
    assert figures["add, kept alive, 64 clients, /s"] == both
    both = {"oqc": [1.5, 1.5], "stdlib": [1.5, 1.5]}
    assert figures["add, kept alive, 16 clients, p99 ms"] == both
    ran = (tmp_path / "programs" / "ran").read_text("ascii").splitlines()
    assert [line.split(" --latency")[0] for line in ran] == 4 * [
        " -t1 -c1 -d7s", " -t1 -c16 -d7s", " -t1 -c64 -d7s",
        "1 -t1 -c16 -d7s", " -t1 -c16 -d7s", "1 -t1 -c16 -d7s"]


def test_a_ratio_is_of_medians_and_above_1_where_oqc_is_ahead(compare):
    figures = {
        "add, /s": {"oqc": [100, 1, 300], "slow": [50, 2000, 1], "fast": [400, 400, 400]},
        "memory, MiB": {"oqc": [100, 1, 300], "slow": [50, 2000, 1], "fast": [400, 400, 400]},
    }
    lines = list(compare.table(["oqc", "slow", "fast"], figures))
    assert [line.split()[-5:] for line in lines[1:]] == [
        ["100.0", "50.0", "400.0", "2.00", "0.25"], ["100.0", "50.0", "400.0", "0.50", "4.00"]]


@pytest.mark.parametrize("said, milliseconds", [
    ("250.00us", 0.25), ("2.50ms", 2.5), ("1.20s", 1200)])
def test_the_percentile_is_in_milliseconds(compare, monkeypatch, tmp_path, said, milliseconds):
    program(tmp_path / "wrk", f"echo '  99%  {said}'", "echo 'Requests/sec: 1.0'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert compare.wrk(1, compare.LOADS[0], 1) == (1.0, pytest.approx(milliseconds))


def test_without_wrk_one_line_says_how_to_get_it(run):
    done = run(None)
    assert (done.returncode, done.stderr) == (1, "wrk is not installed: apt-get install wrk\n")


def test_an_unknown_peer_is_refused_with_those_that_there_are(run):
    done = run(SAID, "--peers", "stdlib,falcon")
    assert done.returncode == 2
    assert "no peer is called falcon; there are fastapi, aiohttp, stdlib, flask\n" in done.stderr


def test_a_server_that_does_not_start_is_said_in_a_line(run):
    done = run(SAID, "--peers", "stdlib", "--oqc", "/bin/false {port}")
    assert done.returncode == 1
    assert done.stderr.startswith("/bin/false ") and done.stderr.endswith(" does not start\n")


def test_answers_that_are_no_success_end_the_run(run):
    done = run(SAID + "  Non-2xx or 3xx responses: 7\n", "--peers", "stdlib")
    assert done.returncode == 1
    assert done.stderr.startswith("add, kept alive, 1 client, /s: not every answer is a success\n")


def test_each_peer_that_can_be_named_is_there(compare):
    peers = {path.stem for path in (ROOT / "scripts" / "peers").glob("peer_*.py")}
    assert peers == {f"peer_{name}" for name in compare.PACKAGES}
    for load in compare.LOADS:
        assert (ROOT / "scripts" / "peers" / load.script).is_file()
