"""Nothing grows without end: what a server holds after 100,000 jobs is what it held after 1,000."""
import http.client
import json
import os

import pytest
from conftest import KEY


def held(pid):
    """(threads, descriptors, MiB of resident memory) of a process."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        resident = next(line for line in file if line.startswith("VmRSS"))
    threads = os.listdir(f"/proc/{pid}/task")
    descriptors = os.listdir(f"/proc/{pid}/fd")
    return len(threads), len(descriptors), int(resident.split()[1]) / 1024


def add_thousands(server, thousands):
    """Add so many thousands of jobs, and wait for the end of each thousand.

    They are echoes, of which some fail, and simulations, which a worker has to run."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    kinds = [{"mode": "simulation"}, {"mode": "echo", "return_code": 1}] + [{"mode": "echo"}] * 18
    body = json.dumps([{"job": "X(90), Y(180)", **kind} for kind in kinds * 50])
    for _ in range(thousands):
        connection.request("POST", "/jobs/add/?wait=60", body, {"api_key": KEY})
        answer = connection.getresponse()
        assert answer.status == 201 and b'"end_time": null' not in answer.read()
    connection.close()


@pytest.mark.slow
def test_threads_descriptors_and_memory_after_100000_jobs_are_what_they_were_after_1000(serve):
    server = serve()
    add_thousands(server, 1)
    before = held(server.process.pid)
    add_thousands(server, 99)
    after = held(server.process.pid)
    print(f"threads, descriptors, MiB: {before} after 1,000 jobs, {after} after 100,000")
    threads, descriptors, memory = (new - old for new, old in zip(after, before))
    assert threads <= 1 and descriptors <= 1 and memory < 8
