"""The table of return codes, each row for each protocol, through a real server and real processes:
the code, and whether the job is tried again."""
import contextlib
import os

import pytest
from conftest import ROOT, Server, until

SECTION = """
[runtime {protocol}]
command = ./{protocol}
protocol = {protocol}
attempts = 2
retry_codes = 75, 7
result_bytes = 1024
slots = 4

[runtime {protocol}-brief]
command = ./{protocol}
protocol = {protocol}
timeout = 0.3
{starts}

[runtime {protocol}-gone]
command = ./{protocol}-gone
protocol = {protocol}
attempts = 2

[runtime {protocol}-barred]
command = ./{protocol}-barred
protocol = {protocol}
attempts = 2
"""
# X(n) ends with the exit status n, Y(n) dies of the signal n, Z(n) is what its row says.
ENDS = """
    "X("*) n=${job#X?}; exit ${n%)} ;;
    "Y("*) n=${job#Y?}; kill -${n%)} $$; sleep 60 ;;
    "Z(0)") exec sleep 60 ;;
"""
EXEC = f"""#!/bin/sh
read -r job
case $job in {ENDS}
    "Z(1)") head -c 1025 /dev/zero ;;
esac
"""
LINES = f"""#!/bin/sh
while read -r line; do
    id=${{line#*\\"id\\": }}; id=${{id%%,*}}
    job=${{line#*\\"job\\": \\"}}; job=${{job%%\\"*}}
    more=
    case $job in {ENDS}
        "Z(1)") code=0 more=", \\"result\\": \\"$(head -c 1025 /dev/zero | tr '\\0' y)\\"" ;;
        "Z(2)") code=NaN ;;
        "Z("*) code=${{job#Z?}}; code=${{code%)}}; code=${{code#9}} ;;
    esac
    echo "{{\\"id\\": $id, \\"return_code\\": $code$more}}"
done
"""
OVER_BOTH = [                       # what happens, the job, on which runtime, code, tried again
    ("its own exit status", "X(1)", "", 1, False),
    ("the largest exit status", "X(255)", "", 255, False),
    ("70 of its own", "X(70)", "", 70, False),
    ("busy", "X(75)", "", 75, True),
    ("a code of retry_codes", "X(7)", "", 7, True),
    ("a result that is too long", "Z(1)", "", 76, False),
    ("longer than its timeout", "Z(0)", "-brief", 124, False),
    ("it ran, and exits 126", "X(126)", "", 126, False),
    ("it ran, and exits 127", "X(127)", "", 127, False),
    ("died of SIGKILL", "Y(9)", "", 137, True),
    ("died of SIGSEGV", "Y(11)", "", 139, True),
    ("180 of its own", "X(180)", "", 180, False),
]
OVER_ONE = [
    ("exec", "success", "X(0)", 0, False),
    ("lines", "success", "Z(90)", 0, False),
    ("lines", "ended without an answer", "X(0)", 76, False),
    ("lines", "an answer that is none", "Z(2)", 76, False),
    ("lines", "an answer with 1", "Z(91)", 1, False),
    ("lines", "an answer with 75", "Z(975)", 75, True),
    ("lines", "an answer with 137", "Z(137)", 137, False),
    ("lines", "an answer with 255", "Z(255)", 255, False),
]
ROWS = [(protocol, what, job, protocol + where, code, again)
        for protocol in ("exec", "lines") for what, job, where, code, again in OVER_BOTH]
ROWS += [(protocol, what, job, protocol, code, again)
         for protocol, what, job, code, again in OVER_ONE]


def write(path, text):
    """Write a file that can be executed."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def start(folder, **options):
    """A server with both runtimes in this folder."""
    for protocol, text in (("exec", EXEC), ("lines", LINES)):
        for name in ("", "-gone", "-barred"):
            write(folder / f"{protocol}{name}", text)
    sections = [SECTION.format(protocol=protocol, starts=starts) for protocol, starts in
                (("exec", ""), ("lines", "start_timeout = 0.1"))]
    (folder / "lab.ini").write_text("".join(sections), encoding="utf-8")
    server = Server(folder, "--config", "lab.ini", "--kill-grace", "0.1", **options)
    for protocol in ("exec", "lines"):
        os.unlink(folder / f"{protocol}-gone")
        (folder / f"{protocol}-barred").chmod(0o644)
    return server


@pytest.fixture(name="lab", scope="module")
def a_server_with_both_protocols(tmp_path_factory):
    """A server that no test changes."""
    server = start(tmp_path_factory.mktemp("codes"))
    yield server
    assert server.stop() == 0


def attempts(server, job):
    """How often a job was tried."""
    return server.request("GET", f"/jobs/{job['id']}/details/").json["attempts"]


@pytest.mark.parametrize("what, job, runtime, code, again", [row[1:] for row in ROWS],
                         ids=[f"{protocol}: {what}" for protocol, what, *_ in ROWS])
def test_each_row_gives_its_code_and_is_tried_again_where_it_says_so(
        lab, what, job, runtime, code, again):
    ended = lab.wait(lab.add(job, "verbatim", runtime=runtime))
    assert ended["return_code"] == code, (what, ended)
    assert ended["status"] == ("Success" if code == 0 else "Runtime Error")
    assert [attempt["return_code"] for attempt in attempts(lab, ended)] == [code] * (1 + again)
    assert lab.runtime(runtime)["state"] in ("idle", "busy"), "none is set aside or paused"


@pytest.mark.parametrize("protocol", ["exec", "lines"])
@pytest.mark.parametrize("where, code", [("gone", 127), ("barred", 126)])
def test_a_program_that_never_ran_costs_no_attempt_and_is_tried_again_until_it_runs(
        tmp_path, protocol, where, code):
    with contextlib.ExitStack() as at_end:
        server = start(tmp_path)
        at_end.callback(server.stop)        # also when what follows fails
        name = f"{protocol}-{where}"
        job = server.add("Z(90)" if protocol == "lines" else "X(0)", "verbatim", runtime=name)
        until(lambda: server.runtime(name)["state"] == "failing")
        # One that is being tried has no code yet.
        codes = {attempt["return_code"] for attempt in attempts(server, job)}
        assert code in codes and codes <= {code, None}
        assert server.get(job)["status"] == "Retrying"
        write(tmp_path / name, {"exec": EXEC, "lines": LINES}[protocol])
        assert server.request("POST", f"/runtimes/{name}/resume/").status == 200
        assert server.wait(job)["status"] == "Success"
        assert attempts(server, job)[-1]["return_code"] == 0


@pytest.mark.parametrize("protocol", ["exec", "lines"])
def test_a_cancel_is_130_and_is_not_tried_again(lab, protocol):
    job = lab.add("Z(0)", "verbatim", runtime=protocol)
    until(lambda: lab.get(job)["start_time"])
    assert lab.request("DELETE", f"/jobs/{job['id']}/").json["return_code"] == 130
    assert [attempt["return_code"] for attempt in attempts(lab, job)] == [130]


# Fails where a process is first listened to. What Python imports by itself at its start.
DEFECT = f"""
import sys
sys.path.append({str(ROOT)!r})
from oqc.process import Process
listen = Process.listen
def fail_once(self, *arguments):
    Process.listen = listen
    raise RuntimeError("a defect")
Process.listen = fail_once
"""


@pytest.mark.parametrize("protocol, works", [("exec", "X(0)"), ("lines", "Z(90)")])
def test_a_defect_of_the_server_is_70_is_not_tried_again_and_leaves_nothing(
        tmp_path, protocol, works):
    (tmp_path / "defect").mkdir()
    write(tmp_path / "defect" / "sitecustomize.py", DEFECT)
    path = f"{tmp_path}/defect:{ROOT}"
    with contextlib.ExitStack() as at_end:
        server = start(tmp_path, environment={"PYTHONPATH": path})
        at_end.callback(server.stop)
        ended = server.wait(server.add("Z(0)", "verbatim", runtime=protocol))
        assert (ended["return_code"], ended["runtime_error"]) == (
            70, "internal error; the server's log has it")
        assert [attempt["return_code"] for attempt in attempts(server, ended)] == [70]
        assert "RuntimeError: a defect" in server.line("RuntimeError")
        assert server.children() == []
        after = server.wait(server.add(works, "verbatim", runtime=protocol))
        assert after["return_code"] == 0
