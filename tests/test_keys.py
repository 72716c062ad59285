"""Who gets in, by which key, and that a key stays where it belongs.

Real servers, real files, real signals.
"""
import contextlib
import os
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys

import pytest
from conftest import KEY, ROOT, RUNTIMES


def started(folder, *arguments, **environment):
    """python -m oqc with these arguments, run to its end."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("OQC_")}
    return subprocess.run([sys.executable, "-m", "oqc", *map(str, arguments)], cwd=folder,
                          check=False, timeout=60, capture_output=True, text=True,
                          env={**env, "PYTHONPATH": str(ROOT), **environment})


@pytest.fixture
def keys(tmp_path):
    """keys(data): the path of a keys file with these bytes; again: the same file with others."""
    def write(data, mode=0o600):
        path = tmp_path / "lab-keys"
        path.write_bytes(data)
        path.chmod(mode)
        return path
    return write


def status(server, key, header="api_key"):
    """The status of an answer that needs a key, to a key of any bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(b"GET /jobs/list/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                       b"%b: %b\r\n\r\n" % (header.encode(), key))
        return int(client.makefile("rb").readline().split()[1])


def submitters(folder):
    """The names beside the jobs, in the order of the jobs."""
    with contextlib.closing(sqlite3.connect(folder / "oqc.db")) as connection:
        return [name for name, in connection.execute("SELECT submitter FROM jobs ORDER BY id")]


# The documented key

@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_the_documented_key_works_on_loopback(serve, host):
    server = serve("--host", host)
    shown = f"[{host}]" if ":" in host else host
    assert f" listening on http://{shown}:" in server.log.replace(
        "http://127.0.0.1:", f"http://{shown}:")
    client = socket.create_connection((host, server.port), timeout=20)
    with contextlib.closing(client), client.makefile("rb") as answer:
        client.sendall(b"HEAD /jobs/list/ HTTP/1.0\r\napi_key: %b\r\n\r\n" % KEY.encode())
        assert answer.readline() == b"HTTP/1.1 200 OK\r\n"


ELSEWHERE = ["evil.example", "evil.example:12021", "localhost.evil.example", "127.0.0.1.evil", "",
             "192.0.2.1", "[::2]:80", "0x7f.1", "localhost:80:80"]
HERE = ["localhost", "LocalHost:8", "localhost.:12021", "127.0.0.1:1", "127.9.9.9", "[::1]:12021"]
PROXY = ["Forwarded: for=1.2.3.4", "X-Forwarded-For: 1.2.3.4", "X-Forwarded-Proto: https",
         "X-Forwarded-Anything: x", "Via: 1.1 squid"]


def status_of(server, line, *fields):
    """The status and the body of an answer to this request line and these header lines."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        head = "\r\n".join([line, *fields, "Connection: close", "", ""])
        client.sendall(head.encode())
        answer = client.makefile("rb").read()
        return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("line", [
    "GET /jobs/list/ HTTP/1.1", "GET /nothing HTTP/1.1", "GET / HTTP/1.1", "PUT /health/ HTTP/1.1",
    "OPTIONS * HTTP/1.1"])
def test_with_the_documented_key_only_this_machine_is_answered_before_all_else(server, line):
    for host in ELSEWHERE:
        found, body = status_of(server, line, f"Host: {host}")
        assert found == 421 and b"key NAME" in body and b"--keys-file" in body, host
    for host in HERE:
        assert status_of(server, line, f"Host: {host}")[0] != 421, host
        for field in PROXY:
            assert status_of(server, line, f"Host: {host}", field)[0] == 421, (host, field)


def test_with_the_documented_key_adds_are_refused_too_and_old_clients_are_answered(server):
    for length in (b"2", b"9000"):          # in the round with others, and before its body came
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
            client.sendall(b"POST /jobs/add/ HTTP/1.1\r\nHost: evil\r\nContent-Length: "
                           b"%b\r\napi_key: %b\r\n\r\n{}" % (length, KEY.encode()))
            assert client.makefile("rb").readline().startswith(b"HTTP/1.1 421 ")
    assert status_of(server, "GET /health/ HTTP/1.0")[0] == 200


def test_with_keys_of_its_own_a_server_is_reached_by_any_name_and_through_a_proxy(serve, keys):
    server = serve("--keys-file", keys(b"alice:secret\n"))
    assert status_of(server, "GET /health/ HTTP/1.1", "Host: oqc.lab", PROXY[1])[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "lab.invalid"])
def test_on_any_other_address_it_does_not_start_without_keys_and_says_how_to_make_one(
        tmp_path, host):
    ended = started(tmp_path, "--port", 0, "--host", host)
    assert (ended.returncode, ended.stdout, os.listdir(tmp_path)) == (78, "", [])
    assert ended.stderr.count("\n") == 1 and "documented key is public" in ended.stderr
    assert "python3 -m oqc key NAME >keys; chmod 600 keys; then --keys-file keys" in ended.stderr


def test_what_that_line_says_to_do_helps(serve, tmp_path):
    ended = started(tmp_path, "--port", 0, "--host", "0.0.0.0")
    commands = re.search(r"(python3 -m oqc key \w+ >(\w+); chmod 600 \w+); then (--keys-file \w+)",
                         ended.stderr)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shell = f'umask 022; python3() {{ "{sys.executable}" "$@"; }}; {commands[1]}'
    subprocess.run(["sh", "-c", shell], check=True, cwd=tmp_path, env=environment)
    server = serve("--host", "0.0.0.0", *commands[3].split())
    name, _, key = (tmp_path / commands[2]).read_text(encoding="utf-8").strip().partition(":")
    assert (name, len(key)) == ("NAME", 43)
    assert (status(server, key.encode()), status(server, KEY.encode())) == (200, 401)


# Where keys come from

def test_a_key_of_a_file_of_the_environment_and_of_systemd_gets_in_and_the_documented_one_does_not(
        serve, keys, tmp_path):
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "oqc-keys").write_bytes(b"carol:cred-key\n")
    path = keys(b"alice:file-key\nbob:bob-key\n")
    credentials = {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")}
    cases = (
        ((), {"OQC_API_KEY": "env-key"}, {b"env-key"}),
        ((), credentials, {b"cred-key"}),
        (("--keys-file", path), {}, {b"file-key", b"bob-key"}),
        (("--keys-file", path), {**credentials, "OQC_API_KEY": "env-key"},
         {b"file-key", b"bob-key", b"env-key"}),
    )
    for flags, environment, right in cases:
        server = serve("--host", "0.0.0.0", *flags, environment=environment)
        known = (b"env-key", b"cred-key", b"file-key", b"bob-key", KEY.encode())
        assert {key for key in known if status(server, key) == 200} == right
        assert server.stop() == 0


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o666, 0o601])
def test_a_keys_file_that_others_may_touch_is_refused_at_start(tmp_path, keys, mode):
    path = keys(b"alice:file-key\n", mode)
    ended = started(tmp_path, "--port", 0, "--keys-file", path)
    assert (ended.returncode, ended.stderr) == (
        78, f"oqc: {path}: others may read it; chmod 600 {path}\n")


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_keys_file_of_its_owner_alone_is_taken(serve, keys, mode):
    assert status(serve("--keys-file", keys(b"alice:file-key\n", mode)), b"file-key") == 200


# What may stand at either end of a header's value
CARRIED = bytes(range(0x21, 0x7f)) + bytes(range(0x80, 0x100))


@pytest.mark.parametrize("key", [
    CARRIED, b"inner  spaces \t and\ttabs", b"a:b:c", b"caf\xc3\xa9 \xe9", b"\xa0\xff\x85",
    b"#:,;\"'\\%", b"x" * 4000, KEY.encode()], ids=lambda key: ascii(key[:20])[2:-1])
def test_a_key_of_any_bytes_that_a_header_can_carry_gets_in_and_one_that_differs_in_one_does_not(
        serve, keys, key):
    server = serve("--keys-file", keys(b"alice:%b\n" % key))
    assert status(server, key) == status(server, b"  \t%b \t" % key) == 200
    assert status(server, key, "X-API-Key") == 200
    assert status(server, b"Bearer " + key, "Authorization") == 200
    for wrong in (key[1:] or b"x", key[:-1] or b"x", key + b"x", b"x" + key,
                  key[:-1] + bytes([key[-1] ^ 1])):
        assert status(server, wrong) == 401, wrong


def test_a_key_of_any_bytes_comes_from_the_environment_too(serve):
    key = b"caf\xe9 \xff\ttab"
    server = serve(environment={"OQC_API_KEY": os.fsdecode(key)})
    assert (status(server, key), status(server, "caf\u00e9 \u00ff\ttab".encode())) == (200, 401)


@pytest.mark.parametrize("key", ["a\nb", "a\x7fb", " ", "\t", "\x01"])
def test_a_key_in_the_environment_that_no_header_can_carry_is_refused(tmp_path, key):
    ended = started(tmp_path, "--port", 0, OQC_API_KEY=key)
    assert ended.returncode == 78
    assert ended.stderr.startswith("oqc: OQC_API_KEY: ") and ended.stderr.count("\n") == 1


def test_blanks_around_a_key_in_the_environment_are_no_part_of_it(serve):
    assert status(serve(environment={"OQC_API_KEY": " env-key\t"}), b"env-key") == 200


# Names

def test_the_name_stands_in_the_log_and_beside_the_job_and_the_key_nowhere(serve, keys, tmp_path):
    path = keys(b"alice:file-key-1\nbob:file-key-2\n")
    server = serve("--keys-file", path, "--log-level", "debug",
                   environment={"OQC_API_KEY": "env-key-3"})
    sent = {"alice": "file-key-1", "bob": "file-key-2", "OQC_API_KEY": "env-key-3"}
    for name, key in sent.items():
        answer = server.request("POST", "/jobs/add/", {"job": "X(90)", "mode": "echo"}, key=key)
        assert answer.status == 201 and name.encode() not in answer.body
    refused = server.request("POST", "/jobs/add/", {"job": "X(90)", "mode": "echo"},
                             key="wrong-key-4")
    assert refused.status == 401
    assert server.request("GET", "/nothing/", key="file-key-1").status == 404
    assert server.request("GET", "/", key=None).status == 200
    assert server.stop() == 0
    assert re.findall(r' access [^"]* "([^"]*)" "POST /jobs/add/" (\d+) ', server.log) == [
        *((name, "201") for name in sent), ("-", "401")]
    assert submitters(tmp_path) == list(sent)
    stored = b"".join(found.read_bytes() for found in tmp_path.glob("oqc.db*"))
    for key in (*sent.values(), "wrong-key-4"):
        assert key not in server.log and key.encode() not in stored


def test_a_request_refused_before_its_body_came_stands_in_the_log_as_what_it_is(serve):
    server = serve()
    head = (b"POST /jobs/add/ HTTP/1.1\r\nHost: localhost\r\napi_key: wrong\r\n"
            b"Content-Length: 9\r\n\r\n")
    client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    with client, client.makefile("rb") as answer:
        client.sendall(head)
        assert answer.readline() == b"HTTP/1.1 401 Unauthorized\r\n"
    assert '"-" "POST /jobs/add/" 401 ' in server.line(" access ")


def test_a_key_that_has_two_names_gets_in_under_one_of_them(serve, keys, tmp_path):
    server = serve("--keys-file", keys(b"alice:same\nbob:same\n"))
    added = server.request("POST", "/jobs/add/", {"job": "X(90)", "mode": "echo"}, key="same")
    assert added.status == 201
    assert submitters(tmp_path)[0] in ("alice", "bob")


# Again

def test_sighup_reads_the_keys_again_and_a_bad_file_keeps_the_old_ones_and_says_so(serve, keys):
    path = keys(b"alice:first-key\n")
    server = serve("--keys-file", path)
    kept = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    assert (status(server, b"first-key"), status(server, b"second-key")) == (200, 401)
    keys(b"bob:second-key\ncarol:third-key\n")
    server.process.send_signal(signal.SIGHUP)
    assert server.line("keys read again").endswith(": bob, carol")
    assert [status(server, key) for key in (b"first-key", b"second-key", b"third-key")] == [
        401, 200, 200]
    for bad, mode, says in ((b"bob-second-key\n", 0o600, "line 1: expected name:key"),
                            (b"", 0o600, "holds no key"),
                            (b"bob:fourth-key\n", 0o644, "others may read it")):
        server.lines.clear()
        keys(bad, mode)
        server.process.send_signal(signal.SIGHUP)
        line = server.line("keys not read again, the old ones stay")
        assert " error " in line and f"{path}: {says}" in line and "second-key" not in line
        assert [status(server, key) for key in (b"second-key", b"fourth-key", KEY.encode())] == [
            200, 401, 401]
    server.lines.clear()
    path.unlink()
    server.process.send_signal(signal.SIGHUP)
    assert "No such file" in server.line("keys not read again, the old ones stay")
    assert status(server, b"second-key") == 200
    with kept, kept.makefile("rb") as answer:       # a connection from before
        for key, expected in ((b"first-key", b"401"), (b"second-key", b"200")):
            kept.sendall(b"HEAD /jobs/list/ HTTP/1.1\r\nHost: localhost\r\n"
                         b"api_key: %b\r\n\r\n" % key)
            assert answer.readline().split()[1] == expected
            while answer.readline().strip():
                pass


def test_sighup_without_a_keys_file_keeps_the_documented_key_and_ends_nothing(serve):
    server = serve()
    server.process.send_signal(signal.SIGHUP)
    server.line("keys read again: documented")
    assert status(server, KEY.encode()) == 200


# The certificate

@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two certificates for 127.0.0.1, each with its key: {name: (certificate, key)}, as bytes."""
    folder = tmp_path_factory.mktemp("pairs")
    made = {}
    for name in ("first", "second"):
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                        "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj",
                        f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key,
                        "-out", certificate], check=True, capture_output=True)
        made[name] = (certificate.read_bytes(), key.read_bytes())
    return made


def shake_hands(server):
    """A connection to a server whose certificate is not checked."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    return context.wrap_socket(raw)


def shown(server):
    """The certificate that a new connection is shown, as PEM."""
    with shake_hands(server) as client:
        pem = ssl.DER_cert_to_PEM_cert(client.getpeercert(binary_form=True))
    return pem.strip().encode()


@pytest.mark.parametrize("one_file", [False, True])
def test_sighup_reads_the_certificate_again_and_a_wrong_pair_keeps_the_old_one(
        serve, tmp_path, pairs, one_file):
    certificate, key = tmp_path / "lab.pem", tmp_path / "lab.key"

    def write(name, key_of):
        if one_file:
            certificate.write_bytes(pairs[name][0] + pairs[key_of][1])
        else:
            certificate.write_bytes(pairs[name][0])
            key.write_bytes(pairs[key_of][1])

    def reload(text):
        server.lines.clear()
        server.process.send_signal(signal.SIGHUP)
        return server.line(text)

    write("first", "first")
    flags = ["--tls-cert", certificate]
    files = str(certificate)
    if not one_file:
        flags += ["--tls-key", key]
        files += f", {key}"
    server = serve(*flags)
    with shake_hands(server) as kept, kept.makefile("rb") as answer:
        assert shown(server) == pairs["first"][0].strip()
        write("second", "second")
        assert shown(server) == pairs["first"][0].strip(), "nobody asked for another"
        assert reload("certificate read again").endswith(f" info certificate read again: {files}")
        assert shown(server) == pairs["second"][0].strip()
        for name, key_of in (("first", "second"), ("second", "first")):
            write(name, key_of)
            line = reload("certificate not read again, the old one stays")
            assert f" error certificate not read again, the old one stays: {files}: " in line
            assert shown(server) == pairs["second"][0].strip()
        certificate.unlink()
        assert "No such file" in reload("certificate not read again, the old one stays")
        assert shown(server) == pairs["second"][0].strip()
        kept.sendall(b"HEAD /health/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer.readline() == b"HTTP/1.1 200 OK\r\n", "the connection from before goes on"
    assert "Traceback" not in server.log


def test_sighup_without_a_certificate_says_nothing_of_one(serve):
    server = serve()
    server.process.send_signal(signal.SIGHUP)
    server.line("keys read again")
    assert server.stop() == 0 and "certificate" not in server.log


# Files and runtimes

@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_the_database_its_wal_and_its_lock_are_for_their_owner_alone_whatever_the_umask(
        serve, tmp_path, umask):
    server = serve(command=("sh", "-c", f'umask {umask:o}; exec "$0" -m oqc "$@"', sys.executable))
    server.wait(server.add())
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {name: 0o600 for name in ("oqc.db", "oqc.db-wal", "oqc.db-shm", "oqc.db.lock")}
    server.process.kill()
    server.stop()
    server = serve(command=("sh", "-c", f'umask {umask:o}; exec "$0" -m oqc "$@"', sys.executable))
    server.wait(server.add())
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {0o600}, "after a kill too"


def test_a_runtime_gets_no_secret_of_the_server(serve, keys, tmp_path):
    (tmp_path / "credentials").mkdir()
    path = keys(b"alice:file-key-1\n")
    server = serve("--keys-file", path, "--runtime", f"qpu={RUNTIMES}/tells", environment={
        "OQC_API_KEY": "env-key-3", "OQC_KEYS_FILE": str(path), "OQC_DRAIN": "5", "PLAIN": "kept",
        "CREDENTIALS_DIRECTORY": str(tmp_path / "credentials"), "NOTIFY_SOCKET": "/nothing"})
    answer = server.request("POST", "/jobs/add/?wait=20", {"job": "X(90)", "mode": "verbatim"},
                            key="file-key-1")
    assert (answer.status, answer.json["status"]) == (201, "Success")
    told = server.request("GET", "/jobs/1/result/", key="file-key-1").json
    assert told["environment"]["PLAIN"] == "kept" and told["descriptors"] == [0, 1, 2]
    ours = ("OQC_", "CREDENTIALS", "NOTIFY")
    assert {name for name in told["environment"] if name.startswith(ours)} == {
        "OQC_JOB_ID", "OQC_MODE", "OQC_ATTEMPT", "OQC_SHOTS", "OQC_SEED", "OQC_RUNTIME",
        "OQC_TIMEOUT", "OQC_SUBMITTER", "OQC_TAG", "OQC_NOTE", "OQC_MARK"}
    assert not any(secret in str(told) for secret in ("file-key-1", "env-key-3", str(path)))
