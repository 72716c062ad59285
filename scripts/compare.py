#!/usr/bin/env python3
"""Measure oqc and other HTTP servers at the same work, in turn, and print the ratios.

    scripts/compare.py [--seconds N] [--rounds N] [--peers NAME,...] [--json FILE]
                       [--oqc COMMAND] [--venv FOLDER]

The peers are in scripts/peers/: the same job contract on FastAPI, aiohttp, the standard library's
ThreadingHTTPServer, and Flask, over one plain store with the same durability. Their packages are
installed into a virtual environment of their own, which needs a package index the first time. The
load is made by wrk (Debian package wrk).

Each round starts oqc and every peer anew, on an empty database and a free port of the loopback
address, measures all rows, and stops it. A figure is the median over the rounds. A ratio is oqc's
figure over the peer's, or the peer's over oqc's where smaller is better: above 1, oqc is ahead.
Absolute figures move with the machine; quote the ratios.
"""
import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "scripts" / "peers"
KEY = "$YboMhcaz7U+3;;M(~t|BX-~ 2kw|ZII2e+s$pw5sBqf$?g]-BYlq.! R/qMR/V="
OQC = f"{shlex.quote(sys.executable)} -m oqc --port {{port}} --db {{db}}"
PACKAGES = {                        # of each peer
    "fastapi": ["fastapi", "uvicorn[standard]"],
    "aiohttp": ["aiohttp"],
    "stdlib": [],
    "flask": ["flask", "waitress"],
}
PATIENCE = 20                       # seconds until a server must have answered
ECHOES = 300                        # jobs added one by one
SMALLER_IS_BETTER = ("p99", "start", "memory")
IN_MILLISECONDS = {"us": 0.001, "ms": 1, "s": 1000}


class Load(NamedTuple):
    """A row that wrk measures."""

    row: str
    script: str
    clients: int
    close: bool                     # a connection of its own for each request


LOADS = (
    Load("add, kept alive, 1 client, /s", "add.lua", 1, False),
    Load("add, kept alive, 16 clients, /s", "add.lua", 16, False),
    Load("add, kept alive, 64 clients, /s", "add.lua", 64, False),
    Load("add, a connection each, 16 clients, /s", "add.lua", 16, True),
    Load("get, kept alive, 16 clients, /s", "get.lua", 16, False),
    Load("get, a connection each, 16 clients, /s", "get.lua", 16, True),
)
WITH_P99 = LOADS[1]


def free_port():
    """Return a port of the loopback address that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def request(port, path, body=None):
    """Return the body of the answer to one request; raise OSError if it is not a success."""
    headers = {"api_key": KEY, "api-key": KEY}
    call = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
    with urllib.request.urlopen(call, timeout=60) as answer:
        return answer.read()


def started(command, port):
    """Start a server; return its process, and the seconds until it answered a first request."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while time.perf_counter() - began < PATIENCE:
        try:
            request(port, "/jobs/list/")
            return process, time.perf_counter() - began
        except OSError:
            if process.poll() is not None:
                raise SystemExit(f"{shlex.join(command)} does not start") from None
            time.sleep(0.005)
    stop(process)
    raise SystemExit(f"{shlex.join(command)} did not answer in {PATIENCE} s")


def stop(process):
    """End a server."""
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def resident(process):
    """Return the MiB of resident memory of a process and of all processes below it."""
    total = 0
    numbers = [process.pid]
    for number in numbers:              # which grows meanwhile
        for task in Path(f"/proc/{number}/task").iterdir():
            with contextlib.suppress(OSError):      # a thread that has ended meanwhile
                numbers += (task / "children").read_text("ascii").split()
        status = Path(f"/proc/{number}/status").read_text("ascii")
        total += int(re.search(r"VmRSS:\s+(\d+)", status)[1])
    return total / 1024


def echoes_ended(port):
    """Return how many echo jobs end in a second that are added one by one, a connection each."""
    began = time.perf_counter()
    for _ in range(ECHOES):
        answer = request(port, "/jobs/add/", b'{"job": "X(90)", "mode": "echo"}')
    last = json.loads(answer)["id"]
    while json.loads(request(port, f"/jobs/{last}/"))["end_time"] is None:
        time.sleep(0.002)
    return ECHOES / (time.perf_counter() - began)


def wrk(port, load, seconds):
    """Return (requests a second, 99th percentile in ms); exit at an answer that is no success."""
    command = [
        "wrk", "-t1", f"-c{load.clients}", f"-d{seconds}s", "--latency",
        "-s", str(PEERS / load.script), f"http://127.0.0.1:{port}",
    ]
    environment = dict(os.environ)
    if load.close:
        environment["CLOSE"] = "1"      # for the script
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode or "Non-2xx" in done.stdout:
        raise SystemExit(f"{load.row}: not every answer is a success\n{done.stdout}{done.stderr}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    p99 = re.search(r"99%\s+([\d.]+)(us|ms|s)", done.stdout)
    return float(rate[1]), float(p99[1]) * IN_MILLISECONDS[p99[2]]


def measure(command, port, seconds):
    """Start a server, measure it and stop it; return {row: figure}."""
    process, start = started(command, port)
    rows = {"start to first answer, ms": start * 1000}
    try:
        rows["memory after start, MiB"] = resident(process)
        rows["echo jobs added one by one and ended, /s"] = echoes_ended(port)
        for load in LOADS:
            rate, p99 = wrk(port, load, seconds)
            rows[load.row] = rate
            if load is WITH_P99:
                rows["add, kept alive, 16 clients, p99 ms"] = p99
    finally:
        stop(process)
    return rows


def environment_for(peers, folder):
    """Return the Python of a virtual environment that has what these peers need."""
    python = os.path.join(folder, "bin", "python")
    packages = [package for peer in peers for package in PACKAGES[peer]]
    try:
        if not os.path.exists(python):
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        if packages:                    # pip asks no index for what is there already
            install = [python, "-m", "pip", "install", "--quiet", *packages]
            subprocess.run(install, check=True)
    except subprocess.CalledProcessError:
        raise SystemExit(f"{folder}: the packages of the peers cannot be installed") from None
    return python


def command_for(name, options, port, database):
    """Return the command that starts oqc, or a peer."""
    if name == "oqc":
        return shlex.split(options.oqc.format(port=port, db=database))
    return [options.python, str(PEERS / f"peer_{name}.py"), str(port), database]


def compare(names, options):
    """Return {row: {name: [a figure of each round]}}."""
    figures = {}
    for _ in range(options.rounds):
        for name in names:
            with tempfile.TemporaryDirectory(prefix="oqc-compare-") as folder:
                port = free_port()
                database = os.path.join(folder, "jobs.db")
                command = command_for(name, options, port, database)
                rows = measure(command, port, options.seconds)
            for row, figure in rows.items():
                figures.setdefault(row, {}).setdefault(name, []).append(figure)
    return figures


def table(names, figures):
    """Yield the lines of the table: the median of each row for each server, then the ratios."""
    titles = "".join(f"{name:>12}" for name in names)
    yield f"{'':42}{titles}   oqc against each"
    for row, by_name in figures.items():
        oqc, *others = map(statistics.median, by_name.values())
        if any(word in row for word in SMALLER_IS_BETTER):
            ratios = [other / oqc for other in others]
        else:
            ratios = [oqc / other for other in others]
        medians = "".join(f"{figure:12.1f}" for figure in (oqc, *others))
        yield f"{row:42}{medians}   " + " ".join(f"{ratio:.2f}" for ratio in ratios)


def peer_names(text):
    """Return the peers that --peers names."""
    names = text.split(",")
    for name in names:
        if name not in PACKAGES:
            known = ", ".join(PACKAGES)
            raise argparse.ArgumentTypeError(f"no peer is called {name}; there are {known}")
    return names


def arguments():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3, help="that wrk takes for a row; 3")
    parser.add_argument("--rounds", type=int, default=3, help="3")
    parser.add_argument("--peers", type=peer_names, default=list(PACKAGES), metavar="NAME,...",
                        help=",".join(PACKAGES))
    parser.add_argument("--oqc", default=OQC, metavar="COMMAND",
                        help="what starts oqc, with {port} and {db} in it")
    parser.add_argument("--venv", type=os.path.abspath, metavar="FOLDER",
                        default=os.path.join(tempfile.gettempdir(), "oqc-peers"),
                        help="where the peers' packages are installed")
    parser.add_argument("--json", type=os.path.abspath, metavar="FILE",
                        help="write every figure here, too")
    return parser.parse_args()


def main():
    """Measure and print the table."""
    options = arguments()
    if not shutil.which("wrk"):
        raise SystemExit("wrk is not installed: apt-get install wrk")
    options.python = environment_for(options.peers, options.venv)
    if options.oqc == OQC:
        os.chdir(ROOT)                  # where `python -m` looks first
    names = ["oqc", *options.peers]
    figures = compare(names, options)
    for line in table(names, figures):
        print(line)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
