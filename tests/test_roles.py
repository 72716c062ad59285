"""Who may do what: three keys of three roles on a running server."""
import json
import os
import pty
import re
import signal
import subprocess

import pytest
from conftest import Server
from test_commands import line, on_a_terminal, run, settled, start

from oqc import commands

KEYS = "ann:operator:op-key\nbob:user:bob-key\neve:user:eve-key\nrita:reader:rita-key\n"
SECRETS = {"ann": "op-key", "bob": "bob-key", "eve": "eve-key", "rita": "rita-key"}
JOB = {"job": "X(90)", "mode": "echo"}
WAITS = {"job": "X(90)", "mode": "verbatim"}


def with_keys(folder, *flags):
    """A server with these keys."""
    path = folder / "lab-keys"
    path.write_text(KEYS, encoding="ascii")
    path.chmod(0o600)
    return Server(folder, "--keys-file", path, "--drain", "0", "--kill-grace", "0", *flags)


@pytest.fixture(name="lab", scope="module")
def a_server_whose_emulator_is_paused(tmp_path_factory):
    """A server with these keys, on which verbatim jobs wait."""
    running = with_keys(tmp_path_factory.mktemp("lab"))
    ask(running, "ann", "POST", "/runtimes/emulator/pause/")
    yield running
    assert running.stop() == 0


def ask(server, name, method, path, body=None, **headers):
    """The answer to a request with somebody's key."""
    return server.request(method, path, body, key=SECRETS[name], headers=headers)


def refusal(answer):
    """The reason of a 403."""
    assert answer.status == 403, (answer.status, answer.body)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json["title"] == "Forbidden"
    assert not any(secret in answer.body.decode() for secret in SECRETS.values())
    return answer.detail


GETS = ("/jobs/list/", "/jobs/1/", "/jobs/1/result/?wait=20", "/jobs/1/details/", "/jobs/1/log/",
        "/runtimes/", "/status/", "/status/?by=bob", "/metrics/", "/health/", "/help/", "/")


def test_everybody_may_read_everything(lab):
    ask(lab, "bob", "POST", "/jobs/add/?wait=20", JOB)
    for name in SECRETS:
        for path in GETS:
            assert ask(lab, name, "GET", path).status == 200, (name, path)


def test_the_commands_of_the_runtimes_are_for_operators(tmp_path):
    running = with_keys(tmp_path, "--runtime", "qpu=/bin/echo secret-address")
    shown = {name: ask(running, name, "GET", "/runtimes/").json for name in SECRETS}
    assert running.stop() == 0
    assert [one["command"] for one in shown["ann"]] == [["/bin/echo", "secret-address"], None, None]
    for name in ("bob", "eve", "rita"):
        assert not any("command" in one for one in shown[name])


@pytest.mark.parametrize("method, path", [
    ("POST", "/jobs/add/"), ("POST", "/jobs/1/rerun/"), ("POST", "/jobs/99/rerun/"),
    ("POST", "/jobs/cancel/?tag=x"), ("POST", "/jobs/cancel/"), ("DELETE", "/jobs/1/"),
    ("DELETE", "/jobs/no/")])
def test_a_reader_changes_nothing_and_is_told_who_may(lab, method, path):
    before = lab.request("GET", "/jobs/list/", key="op-key").body
    assert refusal(ask(lab, "rita", method, path, "no JSON")) == (
        "rita is a reader: only a user or an operator may do this")
    assert lab.request("GET", "/jobs/list/", key="op-key").body == before


@pytest.mark.parametrize("name", ["rita", "bob"])
@pytest.mark.parametrize("method, path", [
    ("DELETE", "/jobs/list/?older-than=0s"), ("DELETE", "/jobs/list/"),
    ("POST", "/runtimes/emulator/pause/"), ("POST", "/runtimes/emulator/resume/"),
    ("POST", "/runtimes/nothing/resume/")])
def test_what_concerns_everybody_takes_an_operator(lab, name, method, path):
    role = {"rita": "reader", "bob": "user"}[name]
    assert refusal(ask(lab, name, method, path)) == (
        f"{name} is a {role}: only an operator may do this")
    assert ask(lab, "ann", "GET", "/runtimes/").json[0]["state"] == "paused"


def test_a_user_cancels_their_own_jobs_and_an_operator_all(lab):
    first, second = (ask(lab, "bob", "POST", "/jobs/add/", WAITS).json["id"] for _ in range(2))
    said = refusal(ask(lab, "eve", "DELETE", f"/jobs/{first}/"))
    assert said == (f"job {first} came with a key of bob: only that name or an operator may cancel "
                    "it, and eve is a user")
    assert ask(lab, "eve", "GET", f"/jobs/{first}/").json["end_time"] is None
    assert ask(lab, "eve", "DELETE", "/jobs/999999/").body == b"0\n"
    assert ask(lab, "bob", "DELETE", f"/jobs/{first}/").json["return_code"] == 130
    assert ask(lab, "ann", "DELETE", f"/jobs/{second}/").json["return_code"] == 130


def test_the_order_of_the_checks(lab):
    """Path and method, key, role, body, id, then what depends on them."""
    assert lab.request("POST", "/jobs/list/", key="wrong").status == 405
    assert lab.request("POST", "/runtimes/none/pause/", key="wrong").status == 401
    assert ask(lab, "bob", "POST", "/runtimes/none/pause/", "{").status == 403
    assert ask(lab, "ann", "POST", "/runtimes/none/pause/", "{").status == 400
    assert ask(lab, "ann", "POST", "/runtimes/none/pause/").status == 404
    raised = {**JOB, "priority": 1}
    assert ask(lab, "rita", "POST", "/jobs/add/", {**raised, "shots": -1}).status == 403
    assert ask(lab, "bob", "POST", "/jobs/add/", {**raised, "shots": -1}).status == 400
    assert ask(lab, "bob", "POST", "/jobs/add/", raised).status == 403


# New members of an add

def details(server, answer):
    assert answer.status == 201, answer.body
    return ask(server, "rita", "GET", f"/jobs/{answer.json['id']}/details/").json


@pytest.mark.parametrize("priority", [0, -1, -100, -1.0])
def test_a_priority_of_0_or_less_is_everybody_s(lab, priority):
    answer = ask(lab, "bob", "POST", "/jobs/add/", {**JOB, "priority": priority})
    assert details(lab, answer)["priority"] == priority


def test_a_priority_above_0_takes_an_operator_and_the_refusal_says_so(lab):
    for priority in (1, 100):
        answer = ask(lab, "ann", "POST", "/jobs/add/", {**JOB, "priority": priority})
        assert details(lab, answer)["priority"] == priority
    before = len(ask(lab, "ann", "GET", "/jobs/list/").json)
    assert refusal(ask(lab, "bob", "POST", "/jobs/add/", {**JOB, "priority": 1})) == (
        "priority: bob is a user, and may give 0 or less; above 0 takes an operator's key")
    said = refusal(ask(lab, "bob", "POST", "/jobs/add/", [JOB, {**JOB, "priority": 7}]))
    assert said.startswith("[1]: priority: bob is a user")
    assert len(ask(lab, "ann", "GET", "/jobs/list/").json) == before


@pytest.mark.parametrize("member, begins", [
    ('"priority": 101', "priority: expected a whole number from -100 to 100, found 101"),
    ('"priority": -101', "priority: expected a whole number from -100 to 100, found -101"),
    ('"priority": null', "priority: expected a whole number from -100 to 100, found null"),
    ('"priority": "1"', "priority: expected a whole number"),
    ('"priority": 0.5', "priority: expected a whole number"),
    ('"priority": true', "priority: expected a whole number"),
    ('"runtime": null', "runtime: expected text, found null"),
    ('"runtime": "qpu-9"', 'runtime: expected one that serves the mode echo: echo; found "qpu-9"'),
    ('"runtime": "emulator"', "runtime: expected one that serves the mode echo: echo; found"),
    ('"runtime": ""', "runtime: expected one that serves")])
def test_a_priority_or_runtime_that_cannot_be_meant_is_400(lab, member, begins):
    body = f'{{"job": "X(90)", "mode": "echo", {member}}}'
    answer = ask(lab, "bob", "POST", "/jobs/add/", body)
    assert answer.status == 400 and answer.detail.startswith(begins), answer.body
    answer = ask(lab, "bob", "POST", "/jobs/add/", f"[{body}]")
    assert answer.status == 400 and answer.detail.startswith("[0]: " + begins), answer.body


def test_the_runtime_that_a_job_asks_for_is_kept(lab):
    answer = ask(lab, "bob", "POST", "/jobs/add/", {**JOB, "runtime": "echo"})
    assert details(lab, answer)["asked_runtime"] == "echo"
    assert details(lab, ask(lab, "bob", "POST", "/jobs/add/", JOB))["asked_runtime"] is None


# Rerun

def test_a_rerun_is_the_same_job_of_whoever_asks(lab):
    asked = {"job": "Y(7)", "mode": "simulation", "shots": 10, "seed": 2 ** 63 - 1, "tag": "rabi",
             "note": {"a": 1}, "runtime": "simulator", "priority": -3}
    first = ask(lab, "bob", "POST", "/jobs/add/?wait=20", asked)
    again = ask(lab, "eve", "POST", f"/jobs/{first.json['id']}/rerun/?wait=20")
    assert again.status == 201 and again.headers["Location"] == f"/jobs/{again.json['id']}/"
    assert again.json["id"] > first.json["id"] and again.json["status"] == "Success"
    shown = details(lab, again)
    before = details(lab, first)
    for name in ("shots", "seed", "tag", "asked_runtime", "sha256"):
        assert shown[name] == before[name], name
    assert (shown["submitter"], shown["note"], shown["priority"]) == ("eve", None, 0)
    results = [ask(lab, "rita", "GET", f"/jobs/{one.json['id']}/result/").body
               for one in (first, again)]
    assert results[0] == results[1]


def test_a_rerun_of_an_echo_fakes_the_same_code_and_counts_once_with_a_key(lab):
    first = ask(lab, "bob", "POST", "/jobs/add/?wait=20", {**JOB, "return_code": 3}).json["id"]
    path = f"/jobs/{first}/rerun/?wait=20"
    once = ask(lab, "bob", "POST", path, **{"Idempotency-Key": "again-1"})
    twice = ask(lab, "bob", "POST", path, **{"Idempotency-Key": "again-1"})
    assert (once.json["return_code"], twice.json["id"]) == (3, once.json["id"])
    assert twice.headers["Idempotent-Replayed"] == "true"
    other = f"/jobs/{once.json['id']}/rerun/"
    assert ask(lab, "bob", "POST", other, **{"Idempotency-Key": "again-1"}).status == 422


@pytest.mark.parametrize("number", ["999999", "07", "x", "9" * 30])
def test_a_rerun_of_no_job_is_404_with_a_zero(lab, number):
    answer = ask(lab, "bob", "POST", f"/jobs/{number}/rerun/")
    assert (answer.status, answer.body) == (404, b"0\n")


def test_a_rerun_takes_no_other_parameter(lab):
    assert "wait" in ask(lab, "bob", "POST", "/jobs/1/rerun/?tag=x").detail


# Names and files

def test_the_status_says_who_asks(lab):
    for name, role in (("ann", "operator"), ("bob", "user"), ("rita", "reader")):
        assert ask(lab, name, "GET", "/status/").json["you"] == {"name": name, "role": role}
    text = ask(lab, "bob", "GET", "/status/", Accept="text/plain").body.decode()
    assert 'you                     {"name": "bob", "role": "user"}\n' in text


def test_a_refusal_stands_in_the_access_log_with_its_name(tmp_path):
    server = with_keys(tmp_path)
    ask(server, "rita", "POST", "/jobs/add/", JOB)
    echo = {"job": "X(90)", "mode": "echo"}
    assert ask(server, "ann", "POST", "/jobs/add/?wait=20", echo).json["end_time"]
    assert ask(server, "ann", "DELETE", "/jobs/list/?older-than=0s").json == {"deleted": 1}
    assert server.stop() == 0
    assert '"rita" "POST /jobs/add/" 403 ' in server.line(" access ")
    assert server.line(" warning ").endswith("verbatim jobs go to an emulator, not to hardware; "
                                             "--runtime NAME=COMMAND names a runtime")
    line = server.line("are deleted, as ann asks for")
    assert re.search(r" info 1 jobs that ended before \S+Z are deleted", line)
    assert not any(secret in server.log for secret in SECRETS.values())


def test_a_name_with_two_keys_is_one_submitter_and_without_an_operator_the_log_says_so(tmp_path):
    path = tmp_path / "lab-keys"
    path.write_text("bob:user:old-key\nbob:user:new-key\n", encoding="ascii")
    path.chmod(0o600)
    server = Server(tmp_path, "--keys-file", path)
    server.line("no key is an operator's")
    server.request("POST", "/jobs/add/", JOB, key="old-key")
    assert server.request("DELETE", "/jobs/1/", key="new-key").status == 409, "it is theirs"
    for key in ("old-key", "new-key"):
        assert len(server.request("GET", "/jobs/list/?by=me", key=key).json) == 1
    assert server.stop() == 0


# The commands

def as_somebody(name):
    return {"OQC_API_KEY": SECRETS[name]}


def test_the_commands_say_what_a_role_may_not_do(lab):
    assert line(run(lab, "add", "X(90)", "--mode", "echo", **as_somebody("rita")), 1) == (
        "rita is a reader: only a user or an operator may do this")
    assert line(run(lab, "pause", "echo", **as_somebody("bob")), 1) == (
        "bob is a user: only an operator may do this")
    ended = run(lab, "add", "X(90)", "--mode", "echo", "--priority", 5, **as_somebody("bob"))
    assert "above 0 takes an operator's key" in line(ended, 1)


def test_the_commands_add_list_wait_cancel_and_run_again_by_a_tag(lab):
    bob = as_somebody("bob")
    added = run(lab, "add", "-", "--mode", "verbatim", "--tag", "cli-1", "--priority", "-5",
                "--runtime", "emulator", text="X(1)\nX(2)\nX(3)\n", **bob)
    numbers = [json.loads(row)["id"] for row in added[1].splitlines()]
    shown = ask(lab, "rita", "GET", f"/jobs/{numbers[0]}/details/").json
    assert [shown[name] for name in ("tag", "priority", "asked_runtime", "submitter")] == [
        "cli-1", -5, "emulator", "bob"]
    filters = ("--tag", "cli-1", "--by", "bob", "--state", "waiting", "--since", "1h",
               "--until", "2999", "--runtime", "emulator", "--status", "Starting",
               "--mode", "verbatim")
    status, out, _ = run(lab, "list", *filters, **bob)
    assert (status, [job["id"] for job in json.loads(out)]) == (0, numbers)
    assert line(run(lab, "wait", "--tag", "cli-1", "--seconds", "0", **bob), 124) == (
        "3 jobs have not ended yet; they go on")
    # Eve's are none of them; nothing asks where there is no terminal.
    assert run(lab, "cancel", "--tag", "cli-1", **as_somebody("eve"))[1] == (
        '{"cancelled": 0, "by": "eve"}\n')
    assert run(lab, "cancel", "--tag", "cli-1", **bob)[1] == '{"cancelled": 3, "by": "bob"}\n'
    status, out, _ = run(lab, "wait", "--tag", "cli-1", **bob)
    assert (status, [json.loads(row)["id"] for row in out.splitlines()]) == (130, numbers)
    status, out, _ = run(lab, "rerun", *numbers, **bob)
    again = [json.loads(row) for row in out.splitlines()]
    assert (status, [job["job"] for job in again]) == (0, ["X(1)", "X(2)", "X(3)"])
    assert run(lab, "cancel", "--tag", "cli-1", "--yes", **bob)[1] == (
        '{"cancelled": 3, "by": "bob"}\n')


def typed(server, answer, *arguments, **more):
    """(exit status, what a terminal showed) of a command whose question is answered so."""
    ours, theirs = pty.openpty()
    shown = b""
    with start(server, *arguments, stdin=theirs, stdout=theirs, stderr=theirs, **more) as process:
        os.close(theirs)
        while b"[y/N] " not in shown:
            shown += os.read(ours, 65536)
        os.write(ours, answer)
        status = process.wait(60)
    shown += os.read(ours, 65536)
    os.close(ours)
    return status, shown.decode()


def test_a_cancel_by_filter_asks_on_a_terminal_how_many(lab):
    for name in ("bob", "eve"):
        ask(lab, name, "POST", "/jobs/add/", [{**WAITS, "tag": "asked"}] * 2)
    cancel = ("cancel", "--tag", "asked")
    status, shown = typed(lab, b"\n", *cancel, **as_somebody("ann"))
    assert status == 1 and "cancel 4 jobs, of which 0 run? [y/N] " in shown
    assert "oqc: nothing is cancelled" in shown
    status, shown = typed(lab, b"y\n", *cancel, **as_somebody("bob"))
    assert status == 0 and "cancel 2 jobs, of which 0 run? [y/N] " in shown
    assert '{"cancelled": 2, "by": "bob"}' in shown
    status, shown = on_a_terminal(lab, "cancel", "--tag", "asked", "--yes", **as_somebody("ann"))
    assert (status, '{"cancelled": 2, "by": null}' in shown) == (0, True)


def test_nobody_is_asked_whether_to_do_what_they_may_not(lab):
    status, shown = on_a_terminal(lab, "cancel", "--tag", "asked", **as_somebody("rita"))
    assert status == 1 and "[y/N]" not in shown
    assert "oqc: rita is a reader: only a user or an operator may do this" in shown


@pytest.mark.parametrize("name, least", [("rita", "reader"), ("bob", "user"), ("ann", "operator")])
def test_the_status_on_a_terminal_says_which_commands_this_key_may_carry_out(lab, name, least):
    """And each --help who may: all that are not named are refused."""
    status, shown = on_a_terminal(lab, "status", **as_somebody(name))
    found = re.search(rf"\n{name} \({least}\) may: (.*)", shown)
    assert status == 0 and found, shown
    may = found[1].strip().split(", ")
    takes = {"add": ["X(1)"], "cancel": [1], "rerun": [1], "prune": ["--older-than", "90d"],
             "pause": ["gone"], "resume": ["gone"]}
    for command in commands.COMMANDS:
        _, out, _ = run(lab, command, "--help")
        assert ("operator may do this." in out) == (command in takes), command
        if command in takes:
            _, _, error = run(lab, command, *takes[command], **as_somebody(name))
            assert ("may do this" in error) == (command not in may), (command, error)
        else:
            assert command in may


@pytest.mark.parametrize("command", ["cancel", "wait"])
def test_ids_or_filters_are_needed_and_not_both(lab, command):
    for arguments in ((), (1, "--tag", "x")):
        ended = run(lab, command, *arguments, **as_somebody("bob"))
        assert "expected the ids of jobs, or flags such as --tag" in line(ended, 2)


@pytest.mark.parametrize("command", ["list", "wait", "cancel"])
def test_an_empty_filter_is_refused_and_not_left_out(lab, command):
    """As of a variable of the shell that is not set: all that waits would be cancelled."""
    waits = ask(lab, "bob", "POST", "/jobs/add/", {**WAITS, "tag": "keep"}).json["id"]
    ended = run(lab, command, "--tag", "", "--mode", "verbatim", **as_somebody("bob"))
    assert 'tag: expected 1 to 64' in line(ended, 1)
    assert ask(lab, "bob", "GET", f"/jobs/{waits}/").json["end_time"] is None
    ask(lab, "bob", "DELETE", f"/jobs/{waits}/")



def test_a_wait_for_a_tag_that_nothing_has_says_so(lab):
    assert line(run(lab, "wait", "--tag", "nothing", **as_somebody("bob")), 1) == "no job matches"
    ended = run(lab, "wait", "--tag", "a b", **as_somebody("bob"))
    assert "tag: expected 1 to 64" in line(ended, 1)


def test_a_wait_for_a_tag_shows_on_a_terminal_how_far_it_is_and_ctrl_c_ends_it_alone(lab):
    ask(lab, "bob", "POST", "/jobs/add/?wait=20", [{**JOB, "tag": "shown", "return_code": 3}] * 2)
    ask(lab, "bob", "POST", "/jobs/add/", [{**WAITS, "tag": "shown"}] * 3)
    ours, theirs = pty.openpty()
    with start(lab, "wait", "--tag", "shown", stdin=theirs, stdout=theirs, stderr=theirs,
               **as_somebody("bob")) as process:
        os.close(theirs)
        shown = b""
        while b"2 of 5 jobs done, 2 failed" not in shown:
            shown += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    os.close(ours)
    counts = ask(lab, "bob", "GET", "/status/?tag=shown").json["jobs"]
    assert (counts["waiting"], counts["failed"]) == (3, 2)
    assert ask(lab, "bob", "POST", "/jobs/cancel/?tag=shown").json["cancelled"] == 3
    status, shown = on_a_terminal(lab, "wait", "--tag", "shown", **as_somebody("bob"))
    assert status == 3 and "5 of 5 jobs done, 5 failed" in shown
    assert settled(shown).splitlines()[0].startswith("ID        STATUS")


# A lab

def curl(server, name, *arguments):
    """What the real curl is answered."""
    done = subprocess.run(
        ["curl", "-sS", "-H", f"api_key: {SECRETS[name]}", *arguments[:-1],
         f"http://127.0.0.1:{server.port}{arguments[-1]}"],
        check=True, capture_output=True, timeout=60)
    return json.loads(done.stdout)


def by_curl_and_by_the_commands_alike(lab):
    """What one may not do is refused, and what one may is done."""
    urgent = '{"job": "X(1)", "mode": "verbatim", "priority": 1}'
    refusal = "priority: eve is a user, and may give 0 or less; above 0 takes an operator's key"
    assert curl(lab, "eve", "-d", urgent, "/jobs/add/")["detail"] == refusal
    assert line(run(lab, "add", "X(1)", "--mode", "verbatim", "--priority", 1,
                    **as_somebody("eve")), 1) == refusal
    assert curl(lab, "ann", "-d", urgent, "/jobs/add/?wait=20")["status"] == "Success"
    run(lab, "pause", "qpu-1", **as_somebody("ann"))
    run(lab, "pause", "qpu-2", **as_somebody("ann"))
    for name in ("bob", "eve"):
        assert run(lab, "add", "-", "--mode", "verbatim", "--tag", "rabi-9", text="X(1)\n" * 5,
                   **as_somebody(name))[0] == 0
    said = [run(lab, "cancel", "--tag", "rabi-9", **as_somebody(name))[1]
            for name in ("eve", "ann")]
    assert said == ['{"cancelled": 5, "by": "eve"}\n', '{"cancelled": 5, "by": null}\n']
    assert json.loads(run(lab, "status", **as_somebody("rita"))[1])["idle"] is True


@pytest.mark.slow                   # a thousand jobs
def test_a_lab_of_three_roles_two_devices_and_a_thousand_jobs(tmp_path, script):
    program = script('while read -r line; do\n'
                     'id=${line#*\\"id\\": }; echo "{\\"id\\": ${id%%,*}, \\"return_code\\": 0}"\n'
                     'done')
    (tmp_path / "lab.ini").write_text("".join(
        f"[runtime qpu-{number}]\ncommand = {program}\nprotocol = lines\n"
        for number in (1, 2)), encoding="utf-8")
    lab = with_keys(tmp_path, "--config", "lab.ini")
    for device in ("qpu-1", "qpu-2"):
        curl(lab, "ann", "-d", '{"reason": "cool-down"}', f"/runtimes/{device}/pause/")
    text = "X(1)\n" * 500
    assert run(lab, "add", "-", "--mode", "verbatim", "--tag", "rabi-7", "--priority", "-5",
               text=text, **as_somebody("bob"))[0] == 0
    jobs = json.dumps([{**WAITS, "tag": "rabi-8", "runtime": "qpu-2"}] * 500)
    (tmp_path / "jobs.json").write_text(jobs, encoding="ascii")
    assert len(curl(lab, "eve", "-d", f"@{tmp_path}/jobs.json", "/jobs/add/")) == 500
    assert curl(lab, "rita", "/status/?state=waiting")["jobs"]["waiting"] == 1000
    assert curl(lab, "eve", "-X", "POST", "/jobs/cancel/?by=bob")["status"] == 403
    assert curl(lab, "eve", "-X", "POST", "/jobs/cancel/?tag=rabi-7") == {
        "cancelled": 0, "by": "eve"}
    last = curl(lab, "rita", "/jobs/list/?tag=rabi-7&order=desc&limit=1")[0]["id"]
    assert run(lab, "cancel", last, **as_somebody("eve"))[0] == 1
    assert run(lab, "cancel", last, **as_somebody("bob"))[0] == 0
    assert line(run(lab, "resume", "qpu-1", **as_somebody("bob")), 1) == (
        "bob is a user: only an operator may do this")
    for device in ("qpu-1", "qpu-2"):
        assert run(lab, "resume", device, **as_somebody("ann"))[0] == 0
    assert curl(lab, "rita", "/status/?tag=rabi-8&wait=60") == {
        "jobs": {"waiting": 0, "running": 0, "retrying": 0, "succeeded": 500, "failed": 0}}
    status, out, _ = run(lab, "wait", "--tag", "rabi-7", **as_somebody("rita"))
    assert (status, out.count("\n")) == (130, 500), "the one that was cancelled"
    theirs = curl(lab, "rita", "/jobs/list/?by=eve")
    assert {job["runtime"] for job in theirs} == {"qpu-2"}
    # Bob's have the lower priority: they go first where eve's may not run, and last where they may.
    his = curl(lab, "rita", "/jobs/list/?by=bob&status=Success")
    starts = [job["start_time"] for job in his if job["runtime"] == "qpu-2"]
    assert all(start >= max(job["start_time"] for job in theirs) for start in starts)
    assert [job["id"] for job in sorted(his, key=lambda job: job["start_time"])
            if job["runtime"] == "qpu-1"][:3] == [job["id"] for job in his][:3]
    failed = curl(lab, "bob", "/jobs/list/?by=me&status=Runtime%20Error")
    assert [job["id"] for job in failed] == [last]
    assert run(lab, "rerun", last, **as_somebody("bob"))[0] == 0
    counts = curl(lab, "bob", "/status/?tag=rabi-7&wait=60")["jobs"]
    assert (counts["succeeded"], counts["failed"]) == (500, 1)
    by_curl_and_by_the_commands_alike(lab)
    assert lab.stop() == 0
