"""The documented API over real HTTP: requests, replies, refusals, keys, listing, results."""
import json
import os
import re
import socket
import subprocess
from http import HTTPStatus
from urllib.parse import parse_qsl

import pytest
from conftest import KEY, Server

from oqc.clock import Clock
from oqc.jobs import Submission
from oqc.store import Store

MEMBERS = ["id", "job", "mode", "status", "runtime", "return_code", "runtime_error",
           "created_time", "start_time", "end_time"]
TIME = re.compile(r"[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-6][0-9]\.[0-9]{6}Z")

# As they stand in the documentation, to the byte.
DOCUMENTED_ADD = r"""curl --location --request POST 'http://localhost:12021/jobs/add/' \
    --header 'api_key: $YboMhcaz7U+3;;M(~t|BX-~ 2kw|ZII2e+s$pw5sBqf$?g]-BYlq.! R/qMR/V=' \
    --header 'Content-Type: text/plain' \
    --data-raw '{
      "job": "X(0), Y(0), X(0)",
      "mode": "verbatim"
    }'
"""
DOCUMENTED_LIST = r"""curl --location --request GET 'http://localhost:12021/jobs/list/' \
    --header 'api_key: $YboMhcaz7U+3;;M(~t|BX-~ 2kw|ZII2e+s$pw5sBqf$?g]-BYlq.! R/qMR/V=' \
    --header 'Content-Type: text/plain'
"""
DOCUMENTED_GET = DOCUMENTED_LIST        # the documentation shows the listing there, too
DOCUMENTED_BODY = """{
      "job": "X(90), Y(180), X(90)",
      "mode": "verbatim",
    }
"""


def curl(server, command):
    """What the real curl prints for a documented command, with nothing but the port replaced."""
    command = command.replace("12021", str(server.port))
    environment = {**os.environ, "no_proxy": "*"}
    ended = subprocess.run(["sh", "-c", command], env=environment, check=True, timeout=60,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return ended.stdout


def is_problem(answer, status, detail=None):
    """Check that an answer is a problem detail as RFC 9457 and the design have it; its text."""
    assert answer.status == status, (answer.status, answer.body)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert list(answer.json) == ["type", "title", "status", "detail"]
    assert answer.json["type"] == "about:blank"
    assert (answer.json["title"], answer.json["status"]) == (HTTPStatus(status).phrase, status)
    assert answer.detail and "\n" not in answer.detail and answer.detail == answer.detail.strip()
    assert answer.body.endswith(b"}\n") and answer.body.count(b"\n") == 1
    assert detail is None or answer.detail == detail
    return answer.detail


# The three documented requests

def test_the_documented_request_to_add_a_job_works_as_it_is_pasted(server):
    added = json.loads(curl(server, DOCUMENTED_ADD))
    assert (added["job"], added["mode"]) == ("X(0), Y(0), X(0)", "verbatim")
    assert server.wait(added)["status"] == "Success"


def test_the_documented_request_to_list_jobs_works_as_it_is_pasted(server):
    added = server.wait(server.add())
    assert json.loads(curl(server, DOCUMENTED_LIST))[-1] == added


def test_the_documented_request_to_get_a_job_works_as_it_is_pasted_and_for_an_id(server):
    added = server.wait(server.add())
    assert json.loads(curl(server, DOCUMENTED_GET))[-1] == added
    assert json.loads(curl(server, DOCUMENTED_GET.replace("/list/", f"/{added['id']}/"))) == added


def test_the_documented_body_with_the_comma_before_its_last_brace_is_taken(server):
    answer = server.request("POST", "/jobs/add/", DOCUMENTED_BODY)
    job = answer.json
    assert (answer.status, job["job"], job["mode"]) == (201, "X(90), Y(180), X(90)", "verbatim")


# A job's object

def test_a_new_job_is_answered_with_201_its_location_and_its_ten_members_in_order(server):
    answer = server.request("POST", "/jobs/add/", {"job": "X(90), Y(180), X(90)", "mode": "echo"})
    job = answer.json
    assert (answer.status, answer.headers["Content-Type"]) == (201, "application/json")
    assert answer.headers["Location"] == f"/jobs/{job['id']}/"
    assert answer.body.endswith(b"}\n") and list(job) == MEMBERS
    assert isinstance(job["id"], int) and TIME.fullmatch(job["created_time"])
    assert list(job.values()) == [
        job["id"], "X(90), Y(180), X(90)", "echo", "Starting", None, None, None,
        job["created_time"], None, None]


@pytest.mark.parametrize("mode, runtime", [
    ("verbatim", "emulator"), ("simulation", "simulator"), ("echo", "echo")])
def test_a_job_of_each_mode_is_run_and_keeps_its_members_in_order(server, mode, runtime):
    added = server.add("X(90), Z(1)", mode)
    answer = server.request("GET", f"/jobs/{added['id']}/?wait=30")
    job = answer.json
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.body.endswith(b"}\n") and list(job) == MEMBERS
    assert list(job.values())[:8] == [
        added["id"], "X(90), Z(1)", mode, "Success", runtime, 0, None, added["created_time"]]
    assert TIME.fullmatch(job["start_time"]) and TIME.fullmatch(job["end_time"])
    assert job["created_time"] <= job["start_time"] <= job["end_time"]


@pytest.mark.parametrize("code", [1, 3, 123, 255])
def test_an_echo_ends_with_the_return_code_that_was_asked_for(server, code):
    job = server.wait(server.add(mode="echo", return_code=code))
    assert (job["status"], job["return_code"]) == ("Runtime Error", code)
    assert job["runtime_error"] == f"echo of return code {code}"


def test_ids_are_given_out_in_order_and_never_again(server):
    first = server.add()["id"]
    assert server.add()["id"] == first + 1


@pytest.mark.parametrize("content_type", [
    None, "text/plain", "application/json", "image/png", "nonsense"])
def test_the_content_type_of_a_request_is_not_looked_at(server, content_type):
    headers = {"Content-Type": content_type} if content_type else {}
    body = b'{"job": "X(1)", "mode": "echo"}'
    assert server.request("POST", "/jobs/add/", body, headers=headers).status == 201


def test_a_job_of_100_000_pulses_is_accepted_and_shown_as_it_was_sent(server):
    text = ", ".join(["X(90)", "Y(180)"] * 50_000)
    assert server.get(server.add(text, "echo"))["job"] == text


# Errors in looking a job up

@pytest.mark.parametrize("number", [
    "0", "00", "07", "-1", "+1", "abc", "1.0", "1e3", "0x1", "1_0", "1,2", "%31", "%D9%A3", "%20",
    "1%20", "1%0A", "1%00", "null", "None", "9223372036854775807", "9223372036854775808",
    "99999999999999999999", "9" * 5000, "list%2F"])
@pytest.mark.parametrize("rest", ["/", "", "/result/", "/result"])
def test_an_error_in_looking_a_job_up_is_404_with_a_zero(server, number, rest):
    server.add()
    answer = server.request("GET", f"/jobs/{number}{rest}")
    assert (answer.status, answer.body) == (404, b"0\n")
    assert answer.headers["Content-Type"] == "application/json"


def test_an_id_that_was_never_given_out_is_404_with_a_zero_until_it_is(server):
    job = server.add()["id"] + 1
    assert server.request("GET", f"/jobs/{job}/").body == b"0\n"
    assert server.request("DELETE", f"/jobs/{job}/").body == b"0\n"
    assert server.add()["id"] == job
    assert server.request("GET", f"/jobs/{job}/").json["id"] == job


def test_the_digits_of_another_script_are_no_id_even_unencoded(server):
    request = ("GET /jobs/٣/ HTTP/1.1\r\nHost: localhost\r\n"
               f"api_key: {KEY}\r\nConnection: close\r\n\r\n")
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(request.encode())
        assert client.makefile("rb").readline() == b"HTTP/1.1 400 Bad Request\r\n"


# Problem details

@pytest.mark.parametrize("path", [
    "//", "/jobs", "/jobs/", "/jobs//", "/nothing", "/jobs/1/other/", "/jobs/add/1/", "/jobs/1//",
    "//jobs/list/", "/JOBS/LIST/", "/jobs/1/result//"])
def test_a_path_where_nothing_is_gets_a_problem_detail(server, path):
    assert json.dumps(path) in is_problem(server.request("GET", path), 404)


@pytest.mark.parametrize("path, allowed", [
    ("/jobs/add/", "OPTIONS, POST"), ("/jobs/list/", "DELETE, GET, HEAD, OPTIONS"),
    ("/jobs/1/", "DELETE, GET, HEAD, OPTIONS"), ("/jobs/1/result/", "GET, HEAD, OPTIONS"),
    ("/jobs/abc/", "DELETE, GET, HEAD, OPTIONS")])
@pytest.mark.parametrize("slash", ["/", ""])
def test_a_path_says_which_methods_it_allows(server, path, allowed, slash):
    path = path.rstrip("/") + slash
    options = server.request("OPTIONS", path, key=None)
    assert (options.status, options.headers["Allow"], options.body) == (204, allowed, b"")
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE"):
        if method not in allowed:
            answer = server.request(method, path)
            assert (answer.status, answer.headers["Allow"]) == (405, allowed)
            if method != "HEAD":
                is_problem(answer, 405, f"{method} is not for this path; allowed: {allowed}; "
                           "GET / shows what is there")


def test_every_get_works_as_head_with_the_same_head_and_no_body(server):
    job = server.wait(server.add())["id"]
    for path in (f"/jobs/{job}/", f"/jobs/{job}/result/", "/jobs/list/?limit=1", "/jobs/list/",
                 "/jobs/07/", "/nothing", "/jobs/list/?limit=x"):
        get = server.request("GET", path)
        head = server.request("HEAD", path)
        assert (head.status, head.body) == (get.status, b"")
        assert {**head.headers, "Date": ""} == {**get.headers, "Date": ""}


def test_every_path_works_with_and_without_its_last_slash(server):
    assert server.request("POST", "/jobs/add", {"job": "X(0)", "mode": "echo"}).status == 201
    job = server.wait(server.add())["id"]
    for path in (f"/jobs/{job}", f"/jobs/{job}/result", "/jobs/list"):
        with_slash = server.request("GET", path + "/")
        without = server.request("GET", path)
        assert with_slash.status == without.status == 200
        assert with_slash.body == without.body


# Keys

@pytest.mark.parametrize("header, value", [
    ("api_key", KEY), ("API_KEY", KEY), ("Api_Key", f"  {KEY} "), ("X-API-Key", KEY),
    ("x-api-key", KEY), ("Authorization", f"Bearer {KEY}"), ("authorization", f"bearer {KEY}"),
    ("Authorization", f"BEARER   {KEY}")])
def test_the_key_is_taken_from_each_of_the_three_headers(server, header, value):
    answer = server.request("GET", "/jobs/list/?limit=1", key=None, headers={header: value})
    assert answer.status == 200


@pytest.mark.parametrize("headers", [
    {}, {"api_key": ""}, {"api_key": "x"}, {"api_key": KEY[:-1]}, {"api_key": KEY + "="},
    {"api_key": KEY.lower()}, {"api_key": KEY.replace(" ", "")}, {"api_key": f"'{KEY}'"},
    {"api_key": f"Bearer {KEY}"}, {"api-key": KEY}, {"key": KEY}, {"X-API-Key": "x"},
    {"Authorization": KEY}, {"Authorization": "Bearer"}, {"Authorization": f"Basic {KEY}"},
    {"Authorization": "Bearer x"}, {"Cookie": f"api_key={KEY}"},
    {"api_key": "clé".encode("latin-1")}, {"api_key": "ключ".encode()}, {"X-API-Key": b"\xff\xfe"},
    {"Authorization": b"Bearer \xff"}, {"api_key": "x", "X-API-Key": KEY}],
    ids=lambda value: repr(value)[:24])
def test_a_missing_or_wrong_key_is_401_and_the_answer_says_which_header_to_send(server, headers):
    for method, path in (("GET", "/jobs/list/"), ("GET", "/jobs/1/"), ("GET", "/jobs/07/"),
                         ("POST", "/jobs/add/"), ("GET", "/jobs/1/result/"),
                         ("DELETE", "/jobs/1/")):
        answer = server.request(method, path, key=None, headers=headers)
        detail = is_problem(answer, 401)
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        for word in ("api_key", "X-API-Key", "Authorization: Bearer", "underscores_in_headers"):
            assert word in detail
        came = {"api_key", "X-API-Key", "Authorization"} & set(headers)
        assert detail.startswith("this key is not known; send " if came else "send ")


def test_without_a_key_nothing_is_stored(server):
    before = server.add()["id"]
    job = {"job": "X(0)", "mode": "echo"}
    assert server.request("POST", "/jobs/add/", job, key="wrong").status == 401
    assert server.add()["id"] == before + 1


# Refusals of a body

def echo(members):
    """The body of an echo, with something more."""
    return b'{"job": "X(1)", "mode": "echo", %b}' % members


REFUSED = {
    "nothing": (
        b"", 'body: empty; expected a job such as {"job": "X(90)", "mode": "simulation"}'),
    "blanks": (b" \r\n", "body: empty; "),
    "text": (b"X(90)", "body: not JSON: "),
    "a form": (b"job=X(90)&mode=echo", "body: not JSON: "),
    "cut off": (b'{"job": "X(90)", "mode": "echo"', "body: not JSON: "),
    "two values": (b'{"job": "X(90)", "mode": "echo"} {}', "body: not JSON: "),
    "single quotes": (b"{'job': 'X(90)', 'mode': 'echo'}", "body: not JSON: "),
    "two commas": (b'{"job": "X(90)", "mode": "echo",,}', "body: not JSON: "),
    "a comma first": (b'{,"job": "X(90)", "mode": "echo"}', "body: not JSON: "),
    "a comma after the last brace": (b'{"job": "X(90)", "mode": "echo"},', "body: not JSON: "),
    "a comment": (b'{"job": "X(90)", "mode": "echo"} // run', "body: not JSON: "),
    "a line break in text": (b'{"job": "X(90)\n", "mode": "echo"}', "body: not JSON: "),
    "a byte order mark": (b'\xef\xbb\xbf{"job": "X(90)", "mode": "echo"}', "body: not JSON: "),
    "UTF-16": (
        '{"job": "X(90)", "mode": "echo"}'.encode("utf-16"), "body: not UTF-8 at byte 1"),
    "UTF-16 without a mark": (
        '{"job": "X(90)", "mode": "echo"}'.encode("utf-16-le"), "body: not JSON: "),
    "UTF-32": (
        '{"job": "X(90)", "mode": "echo"}'.encode("utf-32"), "body: not UTF-8 at byte 1"),
    "Latin-1": (b'{"job": "X(90)", "mode": "\xe9cho"}', "body: not UTF-8 at byte 27"),
    "a surrogate's three bytes": (
        b'{"job": "\xed\xa0\x80", "mode": "echo"}', "body: not UTF-8 at byte 10"),
    "an overlong slash": (b'{"job": "\xc0\xaf", "mode": "echo"}', "body: not UTF-8 at byte 10"),
    "half a surrogate pair as job": (
        br'{"job": "X(90)\ud800", "mode": "echo"}', "job: at character 6: "),
    "half a surrogate pair as mode": (
        br'{"job": "X(90)", "mode": "\udc00"}', "mode: expected verbatim, "),
    "half a surrogate pair as name": (
        br'{"job": "X(90)", "mode": "echo", "\ud800": 1}', "unknown member "),
    "a member twice": (
        b'{"job": "X(1)", "job": "X(2)", "mode": "echo"}', "a member is there twice"),
    "the same member twice": (echo(b'"mode": "echo"'), "a member is there twice"),
    "a member twice, deep down": (echo(b'"seed": {"a": 1, "a": 1}'), "a member is there twice"),
    "a member twice, once escaped": (echo(br'"\u006dode": "verbatim"'), "a member is there twice"),
    "NaN": (echo(b'"seed": NaN'), "NaN is not JSON"),
    "Infinity": (echo(b'"shots": Infinity'), "Infinity is not JSON"),
    "minus Infinity": (echo(b'"shots": -Infinity'), "-Infinity is not JSON"),
    "a number without end": (echo(b'"shots": 1e999'), "shots: expected a whole number "),
    "lists in lists": (b"[" * 100_000 + b"]" * 100_000, "body: nested too deeply"),
    "objects in objects": (
        b'{"job":' * 60_000 + b"1" + b"}" * 60_000, "body: nested too deeply"),
    "lists in lists, unclosed": (
        b'{"job": "X(1)", "mode": ' + b"[" * 100_000, "body: nested too deeply"),
    "5,000 digits": (echo(b'"seed": ' + b"9" * 5000), ""),
    "4,000 digits": (echo(b'"seed": ' + b"9" * 4000), "seed: expected a whole "),
    "an unknown member": (echo(b'"prio": 1'), 'unknown member "prio": allowed are '),
    "an empty name": (echo(b'"": 1'), 'unknown member "": allowed are '),
    "a list of text": (
        b'["X(1)", "echo"]', "[0]: expected an object with job and mode, found text"),
    "null": (b"null", "expected an object with job and mode, found null"),
    "a number": (b"1", "expected an object with job and mode, found a number"),
    "no member": (b"{}", "job: missing; "),
    "a job that is a number": (
        b'{"job": 90, "mode": "echo"}', "job: expected text, found a number"),
    "a job that is a list": (
        b'{"job": ["X(1)"], "mode": "echo"}', "job: expected text, found an array"),
    "a mode that is null": (
        b'{"job": "X(1)", "mode": null}', "mode: expected text, found null"),
    "an unknown mode": (
        b'{"job": "X(1)", "mode": "real"}',
        'mode: expected verbatim, simulation or echo, found "real"'),
    "a line break after the job": (
        br'{"job": "X(1)\n", "mode": "echo"}', "job: at character 5: "),
    "an angle in other digits": (
        '{"job": "X(٣)", "mode": "echo"}'.encode(), "job: at character 3: "),
    "shots as text": (echo(b'"shots": "7"'), "shots: expected a whole number from 0 to "),
    "shots as a fraction": (echo(b'"shots": 7.5'), "shots: expected a whole number from "),
    "shots as truth": (echo(b'"shots": true'), "shots: expected a whole number from 0 "),
    "shots below 0": (echo(b'"shots": -1'), "shots: expected a whole number from 0 to "),
    "shots over a million": (echo(b'"shots": 1000001'), "shots: expected a whole number "),
    "a seed of 2^63": (echo(b'"seed": 9223372036854775808'), "seed: expected a whole "),
    "a seed below 0": (echo(b'"seed": -1'), "seed: expected a whole number from 0 to "),
    "a seed that is null": (echo(b'"seed": null'), "seed: expected a whole number from "),
    "a return code of 256": (echo(b'"return_code": 256'), "return_code: expected a whole "),
    "a return code for hardware": (
        b'{"job": "X(1)", "mode": "verbatim", "return_code": 1}',
        "return_code: allowed only with the mode echo"),
}


@pytest.mark.parametrize("body, begin", REFUSED.values(), ids=REFUSED)
def test_a_body_that_is_no_job_is_400_with_its_reason_and_nothing_is_stored(server, body, begin):
    before = server.add()["id"]
    assert is_problem(server.request("POST", "/jobs/add/", body), 400).startswith(begin)
    assert server.add()["id"] == before + 1


def test_the_offset_of_a_wrong_character_is_in_the_answer_as_the_issue_shows_it(server):
    answer = server.request("POST", "/jobs/add/", {"job": "X(180); Y(90)", "mode": "verbatim"})
    is_problem(answer, 400,
               'job: at character 7: expected ", " and a pulse such as X(90), found ";"')


@pytest.mark.parametrize("body", [
    b' \r\n\t{ "mode" : "echo" , "job" : "X(1)" } \n',
    br'{"job": "\u0058(1)", "mode": "ech\u006f"}',
    b'{"job": "X(1)", "mode": "echo" , \n } \n',
    b'{"job": "X(1)", "mode": "echo", "shots": -0}'])
def test_a_body_in_another_spelling_of_the_same_json_is_taken(server, body):
    answer = server.request("POST", "/jobs/add/", body)
    assert (answer.status, answer.json["job"], answer.json["mode"]) == (201, "X(1)", "echo")


# Results

@pytest.fixture(name="outside", scope="module")
def a_server_with_an_outside_runtime(tmp_path_factory):
    """A server whose runtime does what the job says: X(0) puts out JSON, X(1) text, X(2) nothing,
    X(3) fails, X(4) waits."""
    folder = tmp_path_factory.mktemp("outside")
    os.mkfifo(folder / "go")
    program = folder / "my-runtime"
    program.write_text(fr"""#!/bin/sh
read -r job
case $job in
"X(0)") echo ' {{"fidelity": 0.5}} '; echo ;;
"X(1)") echo '{{"fidelity": 0.5'; echo done ;;
"X(2)") ;;
"X(3)") echo partial; echo first >&2; echo last >&2; exit 3 ;;
"X(4)") cat {folder}/go ;;
"X(5)") printf 'no line end' ;;
"X(6)") echo '[NaN]' ;;
"X(7)") printf '\033[2J\000\r\n \n' ;;
"X(8)") printf '\377\000\303\251' ;;
"X(9)") printf '{{"a": "\377"}}\n' ;;
*) printf '%s\n' "$job" "$@"
   echo "$OQC_JOB_ID $OQC_MODE $OQC_RUNTIME $OQC_ATTEMPT $OQC_SHOTS $OQC_SEED" ;;
esac
""", encoding="utf-8")
    program.chmod(0o755)
    server = Server(folder, "--runtime", f"qpu-1={program} --flag 'two words'")
    yield server
    assert server.stop() == 0


@pytest.mark.parametrize("job, content_type, body", [
    ("X(0)", "application/json", b' {"fidelity": 0.5} \n\n'),
    ("X(1)", "text/plain; charset=utf-8", b'{"fidelity": 0.5\ndone\n'),
    ("X(2)", "application/json", b"null\n"),
    ("X(3)", "text/plain; charset=utf-8", b"partial\n"),
    ("X(5)", "text/plain; charset=utf-8", b"no line end\n"),
    ("X(6)", "text/plain; charset=utf-8", b"[NaN]\n"),
    ("X(7)", "text/plain; charset=utf-8", b"\x1b[2J\0\r\n \n"),
    ("X(8)", "application/octet-stream", b"\xff\0\xc3\xa9"),
    ("X(9)", "application/octet-stream", b'{"a": "\xff"}\n')])
def test_what_a_runtime_put_out_is_served_byte_for_byte_as_json_text_or_bytes(
        outside, job, content_type, body):
    ended = outside.wait(outside.add(job, "verbatim"))
    assert ended["runtime"] == "qpu-1"
    assert ended["return_code"] == (3 if job == "X(3)" else 0)
    answer = outside.result(ended)
    assert (answer.status, answer.headers["Content-Type"]) == (200, content_type)
    assert answer.body == body


def test_an_outside_runtime_gets_its_arguments_its_environment_and_the_job_byte_for_byte(outside):
    text = "X(007), X(0), X(0), Z(999), Y(360)"
    job = outside.wait(outside.add(text, "verbatim", shots=17, seed=2 ** 63 - 1))
    assert outside.result(job).body.decode().splitlines() == [
        text, "--flag", "two words", f"{job['id']} verbatim qpu-1 1 17 9223372036854775807"]


def test_the_result_of_a_job_that_has_not_ended_is_409_and_200_once_it_has(outside):
    job = outside.add("X(4)", "verbatim")
    is_problem(outside.result(job), 409, f"job {job['id']} has not ended yet: Starting")
    with open(outside.folder / "go", "w", encoding="utf-8") as fifo:    # opens when it is read
        running = outside.get(job)
        assert (running["status"], running["runtime"]) == ("Starting", "qpu-1")
        assert running["start_time"] and running["end_time"] is running["return_code"] is None
        is_problem(outside.result(job), 409)
        fifo.write("1\n")
    assert outside.wait(job)["status"] == "Success"
    assert outside.result(job).body == b"1\n"


def test_the_result_of_an_echo_is_null(server):
    assert server.result(server.wait(server.add(mode="echo", return_code=2))).body == b"null\n"


def simulated(server, job, **members):
    """The result of a simulation."""
    answer = server.result(server.wait(server.add(job, "simulation", **members)))
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    return answer.json


def test_the_result_of_a_simulation_has_its_members_in_order_and_a_thousand_shots(server):
    result = simulated(server, "X(90), Z(90)")
    assert list(result) == ["shots", "seed", "counts", "probabilities", "statevector", "bloch"]
    assert list(result["counts"]) == ["0", "1"]
    assert sum(result["counts"].values()) == result["shots"] == 1000
    assert 400 < result["counts"]["1"] < 600, "six standard deviations"
    assert result["probabilities"] == pytest.approx([0.5, 0.5], abs=1e-12)
    assert result["bloch"] == pytest.approx([1, 0, 0], abs=1e-12)
    (alpha_real, alpha_imaginary), (beta_real, beta_imaginary) = result["statevector"]
    norm = alpha_real ** 2 + alpha_imaginary ** 2 + beta_real ** 2 + beta_imaginary ** 2
    assert norm == pytest.approx(1, abs=1e-12)


def test_a_simulation_with_a_seed_can_be_repeated_also_with_one_that_the_server_chose(server):
    chosen = simulated(server, "X(90)", shots=100_000)
    other = simulated(server, "X(90)", shots=100_000)
    assert 0 <= chosen["seed"] < 2 ** 63 and chosen["seed"] != other["seed"]
    assert simulated(server, "X(90)", shots=100_000, seed=chosen["seed"]) == chosen
    results = [simulated(server, "X(90)", shots=100_000, seed=seed) for seed in (1, 2, 3)]
    assert len({result["counts"]["1"] for result in results}) > 1, "the seed decides"


@pytest.mark.parametrize("seed", [0, 1, 2 ** 53 + 1, 2 ** 63 - 1])
def test_a_seed_is_kept_to_its_last_bit(server, seed):
    assert simulated(server, "X(90)", seed=seed)["seed"] == seed


def test_a_simulation_of_no_shots_is_exact_and_has_no_counts(server):
    result = simulated(server, "X(90), Y(180), X(90)", shots=0)
    assert result["shots"] == 0 and not result.get("counts")
    assert result["probabilities"] == pytest.approx([0, 1], abs=1e-12)


def test_a_simulation_takes_a_million_shots(server):
    result = simulated(server, "X(180)", shots=1_000_000)
    assert result["counts"] == {"0": 0, "1": 1_000_000}


# Waiting

@pytest.mark.parametrize("query", [
    "wait=-1", "wait=301", "wait=", "wait", "wait=1.5", "wait=1&wait=1", "wiat=1"])
def test_a_wrong_parameter_beside_an_id_is_refused_where_the_job_is_there(server, query):
    job = server.add()["id"]
    for path in (f"/jobs/{job}/", f"/jobs/{job}/result/"):
        assert "wait" in is_problem(server.request("GET", f"{path}?{query}"), 400)


# Listing

JOBS = 2503


@pytest.fixture(name="listed", scope="module")
def a_server_with_more_jobs_than_two_pages(tmp_path_factory):
    """(a server with 2,503 jobs, which have ended but for the last two, its jobs)."""
    folder = tmp_path_factory.mktemp("listed")
    store = Store(str(folder / "oqc.db"), Clock())
    sound = Submission("X(0)", "echo", seed=0)
    echoes = [sound] * (JOBS - 5)
    for place in range(0, len(echoes), 5):
        echoes[place] = sound._replace(return_code=9)
    modes = ("simulation", "simulation", "echo", "verbatim", "verbatim")
    others = [Submission("Y(0)", mode, seed=0) for mode in modes]
    store.pause("emulator", "for this test")
    store.add(echoes + others, "test")
    store.close()
    server = Server(folder)
    for number in range(JOBS - 4, JOBS - 1):    # those of a mode run in order, by one worker each
        server.wait(number)
    jobs = server.request("GET", "/jobs/list/").json
    yield server, jobs
    assert server.stop() == 0


def test_a_listing_without_limit_is_streamed_whole_in_id_order_one_job_a_line(listed):
    server, jobs = listed
    answer = server.request("GET", "/jobs/list/")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.headers["Transfer-Encoding"] == "chunked" and "Link" not in answer.headers
    assert [job["id"] for job in jobs] == list(range(1, JOBS + 1))
    begin, *lines, end = answer.body.decode().split("\n")[:-1]
    assert (begin, end) == ("[", "]") and answer.body.endswith(b"\n]\n")
    assert [json.loads(line.rstrip(",")) for line in lines] == jobs
    for number in (1, 1000, 1001, 2000, 2001, JOBS):
        one = server.request("GET", f"/jobs/{number}/")
        assert one.body.decode() == lines[number - 1].rstrip(",") + "\n"
        assert list(one.json) == MEMBERS


def select(jobs, order="asc", after=None, status=None, mode=None):
    """The ids that a listing with these parameters has to show."""
    ids = [job["id"] for job in jobs
           if status in (None, job["status"]) and mode in (None, job["mode"])]
    if order == "asc":
        return [number for number in ids if after is None or number > after]
    return [number for number in reversed(ids) if after is None or number < after]


@pytest.mark.parametrize("order", [None, "asc", "desc"])
@pytest.mark.parametrize("after", [None, 0, 3, 1500, JOBS, 2 ** 63 - 1])
@pytest.mark.parametrize("status", [None, "Starting", "Retrying", "Success", "Runtime Error"])
def test_a_listing_is_ordered_continued_and_filtered_as_its_parameters_say(
        listed, order, after, status):
    server, jobs = listed
    parameters = {"order": order, "after": after, "status": status}
    asked = {name: value for name, value in parameters.items() if value is not None}
    query = "&".join(f"{name}={value}" for name, value in asked.items()).replace(" ", "%20")
    shown = server.request("GET", f"/jobs/list/?{query}").json
    assert [job["id"] for job in shown] == select(jobs, **asked)
    page = server.request("GET", f"/jobs/list/?{query}&limit=7")
    assert page.json == shown[:7] and ("Link" in page.headers) == (len(shown) > 7)


@pytest.mark.parametrize("mode", ["verbatim", "simulation", "echo"])
def test_a_listing_of_one_mode_shows_that_mode(listed, mode):
    server, jobs = listed
    path = f"/jobs/list/?mode={mode}"
    shown = [job["id"] for job in server.request("GET", path).json]
    assert shown == select(jobs, mode=mode) and shown
    waiting = [job["id"] for job in server.request("GET", f"{path}&status=Starting").json]
    assert waiting == ([JOBS - 1, JOBS] if mode == "verbatim" else [])


@pytest.mark.parametrize("query, length", [
    ("", 1000), ("&order=desc", 999), ("&status=Runtime%20Error", 100),
    ("&status=Runtime+Error&order=desc", 77), ("&mode=echo&status=Success", 10_000),
    ("&mode=verbatim", 1)])
def test_following_the_links_shows_every_job_once(listed, query, length):
    server, jobs = listed
    asked = dict(parse_qsl(query))
    path = f"/jobs/list/?limit={length}{query}"
    shown = []
    while path:
        page = server.request("GET", path)
        assert 0 < len(page.json) <= length
        shown += [job["id"] for job in page.json]
        link = page.headers.get("Link")
        path = link and re.fullmatch(r'<(/jobs/list/\?[^>]*)>; rel="next"', link)[1]
        assert bool(link) == (len(shown) < len(select(jobs, **asked)))
    assert shown == select(jobs, **asked)


def test_a_page_that_is_full_to_the_last_job_has_no_link(listed):
    server, _ = listed
    page = server.request("GET", f"/jobs/list/?limit={JOBS}")
    assert len(page.json) == JOBS and "Link" not in page.headers
    assert "Link" in server.request("GET", f"/jobs/list/?limit={JOBS - 1}").headers


def test_jobs_of_megabytes_are_all_listed_and_a_page_of_them_is_cut_with_a_link_to_the_rest(serve):
    server = serve()
    body = [{"job": ", ".join(["X(1)"] * 50_000), "mode": "echo"}] * 10
    for _ in range(4):
        assert server.request("POST", "/jobs/add/", body).status == 201
    assert [job["id"] for job in server.request("GET", "/jobs/list/").json] == list(range(1, 41))
    path = "/jobs/list/?limit=35"
    pages = []
    while path:
        page = server.request("GET", path)
        pages.append([job["id"] for job in page.json])
        link = page.headers.get("Link")
        path = link and link.split(">")[0][1:]
    assert pages == [list(range(first, first + 4)) for first in range(1, 41, 4)]


def test_a_listing_of_nothing_is_an_empty_array(serve):
    server = serve()
    for query in ("", "?limit=5", "?status=Retrying", "?after=9", "?order=desc&limit=1"):
        answer = server.request("GET", f"/jobs/list/{query}")
        assert (answer.status, answer.body) == (200, b"[]\n") and "Link" not in answer.headers


@pytest.mark.parametrize("query, named", [
    *((f"limit={value}", "limit: expected a whole number from 1 to 10000")
      for value in ("0", "-1", "+5", "1_0", "%D9%A3", "10001", "", "abc", "5.0", "1e2", "9" * 30,
                    "%35", "0x5")),
    *((f"after={value}", "after: expected a whole number from 0 to 9223372036854775807")
      for value in ("-1", "9223372036854775808", "x", "", "1.5", "9" * 30)),
    *((f"order={value}", "order: expected asc or desc") for value in ("up", "ASC", "")),
    *((f"status={value}", "status: expected Starting or Retrying or Success or Runtime Error")
      for value in ("success", "Running", "", "Runtime%09Error")),
    *((f"mode={value}", "mode: expected verbatim or simulation or echo")
      for value in ("Echo", "", "real")),
    ("limit", "limit: expected"),
    ("offset=1", 'unknown or repeated parameter "offset"'),
    ("Limit=1", 'unknown or repeated parameter "Limit"'),
    ("limit=1&limit=1", 'unknown or repeated parameter "limit"'),
    ("wait=1", 'unknown or repeated parameter "wait"'),
    ("=1", 'unknown or repeated parameter ""')])
def test_a_wrong_parameter_of_a_listing_is_400_and_is_named(server, query, named):
    assert is_problem(server.request("GET", f"/jobs/list/?{query}"), 400).startswith(named)


def test_a_parameter_where_none_is_known_is_refused_and_that_is_said(server):
    detail = is_problem(server.request("GET", "/status/?wait=1&x=1"), 400)
    assert detail.startswith('unknown or repeated parameter "x": allowed, once each, are ')
    job = server.add()["id"]
    detail = is_problem(server.request("GET", f"/jobs/{job}/details/?x=1"), 400)
    assert detail == 'unknown or repeated parameter "x": none is known'


def test_many_clients_at_once_are_all_answered_with_a_job_of_their_own(serve):
    server = serve()
    body = b'{"job": "X(0)", "mode": "echo"}'
    head = f"POST /jobs/add/ HTTP/1.1\r\nHost: localhost\r\napi_key: {KEY}\r\nConnection: close\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    address = ("127.0.0.1", server.port)
    clients = [socket.create_connection(address, timeout=20) for _ in range(100)]
    for client in clients:
        client.sendall(request)
    answers = [client.makefile("rb").read().partition(b"\r\n\r\n") for client in clients]
    for client in clients:
        client.close()
    assert sorted(json.loads(answer[2])["id"] for answer in answers) == list(range(1, 101))
    assert all(head.startswith(b"HTTP/1.1 201 Created\r\n") for head, *_ in answers)
    assert [job["id"] for job in server.request("GET", "/jobs/list/").json] == list(range(1, 101))
