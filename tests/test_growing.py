"""Beyond one machine: a real Slurm behind a runtime, a real nginx in front."""
import os
import re
import shutil
import signal
import socket
import subprocess
import threading

import pytest
from conftest import KEY, ROOT, need

GROWING = (ROOT / "oqc" / "help" / "growing.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_slurm_runs_jobs_loses_none_while_it_is_away_and_ends_what_is_cancelled():
    need("slurmctld", "slurmd", "munged", "srun")
    if os.getuid():
        pytest.skip("slurmd needs root")
    done = subprocess.run([ROOT / "scripts" / "slurm_demo.sh"], cwd="/", capture_output=True,
                          text=True, check=False, timeout=240,
                          env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"})
    assert done.returncode == 0, done.stdout + done.stderr
    for shown in ("0 3 0, as it must be", "130, as it must be", "no step is left", "is Retrying",
                  "All of it held"):
        assert shown in done.stdout


@pytest.fixture
def nginx(tmp_path):
    """nginx(port, block): the port of a real nginx that has this block of the manual for an oqc."""
    need("nginx")
    started = []

    def start(port, block):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            own = probe.getsockname()[1]
        block = re.sub(r"listen \d+;", f"listen 127.0.0.1:{own};", block)
        block = block.replace("12021", str(port))
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in kinds)
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; worker_processes 1; error_log stderr notice; pid {tmp_path}/pid;\n"
            f"events {{}}\nhttp {{\naccess_log off;\n{paths}{block}}}\n", encoding="utf-8")
        program = shutil.which("nginx", path="/usr/sbin:" + os.environ["PATH"])
        process = subprocess.Popen([program, "-c", tmp_path / "nginx.conf", "-p", tmp_path],
                                   stderr=subprocess.PIPE, text=True)
        started.append(process)
        said = []
        for line in process.stderr:
            said.append(line)
            if "start worker process " in line:
                break
        else:
            pytest.fail("".join(said))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        return own
    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        process.stderr.close()


def curl(port, *arguments):
    """What the real curl gets from this port: (status, body)."""
    done = subprocess.run(["curl", "-sS", "--max-time", "30", "-w", "\n%{http_code}", *arguments,
                           f"http://127.0.0.1:{port}/jobs/add/"], capture_output=True, text=True,
                          check=True)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


JOB = ("-d", '{"job": "X(90)", "mode": "echo"}')


def test_the_nginx_of_the_manual_hands_the_documented_header_on(server, nginx):
    block = re.search(r"(?ms)^```\n(server \{.*?^\}\n)```$", GROWING)[1]
    assert "underscores_in_headers on;" in block
    port = nginx(server.port, block)
    status, body = curl(port, "-H", f"api_key: {KEY}", *JOB)
    assert status == 201 and '"status": "Starting"' in body
    assert curl(port, "-H", "api_key: wrong", *JOB)[0] == 401


def test_without_that_setting_the_answer_names_it_and_another_header_works(server, nginx):
    block = re.search(r"(?ms)^```\n(server \{.*?^\}\n)```$", GROWING)[1]
    port = nginx(server.port, block.replace("underscores_in_headers on;", ""))
    status, body = curl(port, "-H", f"api_key: {KEY}", *JOB)
    assert status == 401 and "underscores_in_headers on" in body
    assert curl(port, "-H", f"X-API-Key: {KEY}", *JOB)[0] == 201
