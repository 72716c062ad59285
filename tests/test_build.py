"""The single file: the same bytes from the same sources, and all that a lab does with it."""
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, Server

UNIT = re.compile(r"(?ms)^```\n(\[Unit\].*?)^```$")
OPERATIONS = (ROOT / "oqc" / "help" / "operations.md").read_text(encoding="utf-8")


def build(folder, python=sys.executable, **options):
    """The .pyz that this Python builds there."""
    subprocess.run([ROOT / "scripts" / "build.sh", folder], env={**os.environ, "PYTHON": python},
                   check=True, capture_output=True, **options)
    return folder / "oqc.pyz"


@pytest.fixture(name="pyz", scope="module")
def the_single_file(tmp_path_factory):
    """oqc.pyz, built for these tests."""
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(name="lab")
def a_lab(pyz, tmp_path):
    """lab(*flags): a server that runs from a copy of the file in tmp_path, where no oqc/ is."""
    started = []
    shutil.copy(pyz, tmp_path / "oqc.pyz")

    def start(*flags, **environment):
        started.append(Server(tmp_path, *flags, command=(sys.executable, "oqc.pyz"),
                              environment={"PYTHONPATH": "", **environment}))
        return started[-1]
    yield start
    for server in started:
        server.stop()


def pythons():
    """All Pythons here that oqc runs on, one of each version."""
    found = {sys.version_info[:2]: sys.executable}
    for path in Path(os.environ.get("PYENV_ROOT", "/nowhere")).glob("versions/3.*/bin/python"):
        version = tuple(int(part) for part in path.parts[-3].split(".")[:2])
        if version >= (3, 9):
            found.setdefault(version, str(path))
    return list(found.values())


def test_every_python_and_every_umask_builds_the_same_bytes(pyz, tmp_path):
    for number, python in enumerate(pythons()):
        built = build(tmp_path / str(number), python, preexec_fn=lambda: os.umask(0o077))
        assert built.read_bytes() == pyz.read_bytes(), python
        assert built.stat().st_mode & 0o777 == 0o755
        assert (tmp_path / str(number) / "SHA256SUMS").stat().st_mode & 0o777 == 0o644


def test_what_is_in_it_is_plain_and_in_order(pyz):
    with zipfile.ZipFile(pyz) as archive:
        entries = archive.infolist()
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "oqc").rglob("*")
             if path.is_file() and path.suffix != ".pyc"]
    assert [entry.filename for entry in entries] == sorted(["__main__.py", *files])
    assert {(entry.date_time, entry.compress_type, entry.external_attr >> 16)
            for entry in entries} == {
        ((1980, 1, 1, 0, 0, 0), zipfile.ZIP_STORED, 0o100644)}


def test_its_sum_is_beside_it(pyz):
    digest = hashlib.sha256(pyz.read_bytes()).hexdigest()
    assert (pyz.parent / "SHA256SUMS").read_text() == f"{digest}  oqc.pyz\n"
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=pyz.parent, check=True,
                   capture_output=True)


@pytest.mark.parametrize("arguments, status", [
    (["--version"], 0), (["--port", "x"], 2), (["--config", "/nothing"], 78),
    (["--db", "/nowhere/x.db"], 1)])
def test_its_exit_statuses_come_through(pyz, arguments, status):
    done = subprocess.run([pyz, *arguments], cwd="/", capture_output=True, check=False, timeout=30)
    assert done.returncode == status and b"Traceback" not in done.stderr


def test_it_serves_every_mode_from_a_folder_of_its_own(lab):
    server = lab()
    for mode in ("verbatim", "simulation", "echo"):
        assert server.wait(server.add("X(90), Y(180), X(90)", mode))["status"] == "Success"
    assert server.request("GET", "/openapi.json").json["openapi"].startswith("3.1")


def test_a_file_that_is_replaced_or_removed_under_the_server_breaks_nothing(lab, tmp_path):
    """Neither what it reads late nor the built-in runtimes, which start anew after they ended."""
    server = lab()
    (tmp_path / "oqc.pyz").write_bytes(b"half a copy")
    (tmp_path / "oqc.pyz").unlink()
    for mode in ("verbatim", "simulation"):
        assert server.wait(server.add("X(90)", mode))["status"] == "Success"
    for number in server.children():
        os.kill(number, 9)
    for mode in ("verbatim", "simulation"):
        assert server.wait(server.add("X(90)", mode))["status"] == "Success"
    for path in ("/", "/openapi.json", "/status/", "/metrics/"):
        assert server.request("GET", path).status == 200
    assert server.request("GET", "/nothing").status == 404


def test_systemd_is_told_when_it_is_ready_and_when_it_stops(lab, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(20)
        server = lab(NOTIFY_SOCKET=str(tmp_path / "notify"))
        assert told.recv(100) == b"READY=1"
        assert server.request("GET", "/health/").status == 200, "it listens when it says so"
        assert server.stop() == 0
        assert told.recv(100) == b"STOPPING=1"


def test_an_abstract_address_is_understood_and_a_dead_one_costs_a_line(lab, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(f"\0oqc-{os.getpid()}")
        told.settimeout(20)
        lab(NOTIFY_SOCKET=f"@oqc-{os.getpid()}").stop()
        assert told.recv(100) == b"READY=1"
    server = lab(NOTIFY_SOCKET=str(tmp_path / "nobody"))
    assert "No such file" in server.line("NOTIFY_SOCKET")
    assert server.request("GET", "/health/").status == 200


@pytest.fixture(name="unit")
def the_unit_of_the_readme(tmp_path):
    """oqc.service as the manual has it, where systemd-analyze can read it."""
    if not shutil.which("systemd-analyze"):
        if os.environ.get("OQC_CI"):
            pytest.fail("systemd-analyze is missing")
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "oqc.service"
    unit.write_text(UNIT.search(OPERATIONS)[1].replace("/usr/local/bin/oqc.pyz", sys.executable),
                    encoding="utf-8")
    return unit


def test_systemd_finds_nothing_wrong_with_the_unit(unit):
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True,
                          check=False, timeout=60)
    said = [line for line in done.stderr.splitlines() if "oqc.service" in line]
    assert (done.returncode, said) == (0, [])


def test_systemd_finds_the_unit_exposed_less_than_2(unit):
    done = subprocess.run(["systemd-analyze", "security", "--offline=yes", "--no-pager", unit],
                          capture_output=True, text=True, check=False, timeout=60)
    level = re.search(r"exposure level for oqc.service: ([0-9.]+)", done.stdout)
    assert float(level[1]) < 2.0, done.stdout
