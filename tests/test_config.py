"""Flags, environment, the runtimes' file: what each becomes, and one line for whatever is wrong."""
import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KEY, ROOT

from oqc import config
from oqc.config import ConfigError
from oqc.jobs import RuntimeSpec

DEFAULTS = {
    "host": "127.0.0.1", "port": 12021, "db": "oqc.db", "config": None, "kill_grace": 5.0,
    "drain": 30.0, "max_body": 4 << 20, "max_connections": 512, "max_waiting": 1_000_000,
    "keep_days": 0, "keys_file": None, "tls_cert": None, "tls_key": None, "log_level": "info",
    "runtime": ()}


def settings(*flags, **environment):
    """The settings that these flags and environment variables make."""
    parser = argparse.ArgumentParser(prog="oqc", allow_abbrev=False)
    config.add_flags(parser, environment)
    return config.settings(parser.parse_args([str(flag) for flag in flags]), environment)


@pytest.fixture
def ini(tmp_path):
    """ini(text): the path of a configuration file with this text."""
    def write(text):
        path = tmp_path / "oqc.ini"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)
    return write


SAYS_MORE = "; python3 -m oqc help configuration says more"


def error(*flags, **environment):
    """The line of the ConfigError that these settings end in."""
    with pytest.raises(ConfigError) as refused:
        settings(*flags, **environment)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# Flags

def test_every_setting_has_its_default():
    made = settings()
    assert {name: getattr(made, name) for name in DEFAULTS} == DEFAULTS
    names = {*DEFAULTS, "runtimes", "keys"}
    assert set(made._fields) == names, "a new setting needs its line above"
    assert made.keys == (("documented", "operator", KEY.encode()),)
    assert made.runtimes == (RuntimeSpec("emulator", None, ("verbatim",), "lines"),
                             RuntimeSpec("simulator", None, ("simulation",), "lines"),
                             RuntimeSpec("echo", None, ("echo",), "echo"))


@pytest.mark.parametrize("name, text, value, other", [
    ("host", "::1", "::1", "127.0.0.2"), ("port", "0", 0, "65535"),
    ("db", "a b.db", "a b.db", "other.db"), ("kill-grace", "0.5", 0.5, "1"),
    ("drain", "0", 0.0, "86400"), ("max-body", "1024", 1024, "2048"),
    ("max-connections", "1", 1, "2"), ("max-waiting", "7", 7, "8"),
    ("tls-cert", "cert.pem", "cert.pem", "x.pem"),
    ("log-level", "debug", "debug", "error")])
def test_a_flag_wins_over_its_environment_variable_and_that_over_the_default(
        name, text, value, other):
    variable, member = "OQC_" + name.upper().replace("-", "_"), name.replace("-", "_")
    assert getattr(settings(**{variable: text}), member) == value != DEFAULTS[member]
    assert getattr(settings("--" + name, text), member) == value
    assert getattr(settings("--" + name, text, **{variable: other}), member) == value


def test_the_flags_that_name_files_have_environment_variables_too(ini, tmp_path):
    path = ini("[runtime qpu]\ncommand = true\n")
    assert settings(OQC_CONFIG=path).runtimes[0].name == "qpu"
    assert settings("--config", path).runtimes[0].name == "qpu"
    keys = tmp_path / "keys"
    keys.write_text("alice:secret\n", encoding="utf-8")
    keys.chmod(0o600)
    assert settings(OQC_KEYS_FILE=str(keys)).keys == (("alice", "operator", b"secret"),)
    assert settings("--keys-file", keys).keys == (("alice", "operator", b"secret"),)
    made = settings("--tls-cert", "c.pem", OQC_TLS_KEY="k.pem")
    assert (made.tls_cert, made.tls_key) == ("c.pem", "k.pem")


@pytest.mark.parametrize("flag, least, most, outside", [
    ("port", "0", "65535", ["-1", "65536"]), ("kill-grace", "0", "3600", ["-0.1", "3600.1", "inf"]),
    ("drain", "0", "86400", ["-1", "86401", "inf"]),
    ("max-body", "1024", str(1 << 30), ["1023", str((1 << 30) + 1)]),
    ("max-connections", "1", "100000", ["0", "100001"]),
    ("max-waiting", "1", "1000000000", ["0", "1000000001"])])
@pytest.mark.parametrize("by_environment", [False, True])
def test_a_number_out_of_its_bounds_is_a_usage_error_that_says_the_bounds(
        flag, least, most, outside, by_environment, capsys):
    def ask(text):
        if by_environment:
            return settings(**{"OQC_" + flag.upper().replace("-", "_"): text})
        return settings(f"--{flag}={text}")
    for text in (least, most):
        assert getattr(ask(text), flag.replace("-", "_")) == float(text)
    for text in [*outside, "", "x", "1 2", "nan", "0x10", "1_0", "٣"]:
        with pytest.raises(SystemExit) as ended:
            ask(text)
        assert ended.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        found = re.escape(f", found {text!r}")
        assert re.search(rf"--{flag}: expected a (whole )?number from .* to .*{found}", line)


@pytest.mark.parametrize("flags, environment", [
    (["--log-level", "loud"], {}), ([], {"OQC_LOG_LEVEL": "loud"}), (["--log-level", ""], {}),
    ([], {"OQC_LOG_LEVEL": "INFO"})])
def test_a_log_level_that_there_is_not_is_a_usage_error(flags, environment, capsys):
    with pytest.raises(SystemExit) as ended:
        settings(*flags, **environment)
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--log-level" in line
    assert all(level in line for level in ("debug", "info", "warning", "error"))


@pytest.mark.parametrize("flags", [
    ["--nothing"], ["--por", "1"], ["extra"], ["--port"], ["--port", "1", "2"],
    ["--log-level", "loud"]])
def test_a_flag_that_there_is_not_is_a_usage_error(flags):
    with pytest.raises(SystemExit) as ended:
        settings(*flags)
    assert ended.value.code == 2


def test_a_private_key_without_a_certificate_is_refused():
    assert error("--tls-key", "key.pem") == "--tls-key: needs --tls-cert beside it"


# --runtime

def test_runtimes_on_the_command_line_serve_verbatim_and_the_built_in_ones_the_rest(script):
    program = script("exit 0")
    made = settings("--runtime", f"qpu-1={program} --flag 'two words' \"a\\\"b\" c=d",
                    "--runtime", "B.2_x=true")
    assert made.runtimes[:2] == (
        RuntimeSpec("qpu-1", (program, "--flag", "two words", 'a"b', "c=d")),
        RuntimeSpec("B.2_x", ("true",)))
    assert made.runtimes[:2][0][2:8] == (("verbatim",), "exec", 1, 60.0, (75,), "retry")
    assert [spec.name for spec in made.runtimes[2:]] == ["simulator", "echo"]


@pytest.mark.parametrize("name", ["db", "config", "keys-file", "tls-cert", "tls-key"])
def test_an_empty_name_of_a_file_is_a_usage_error_and_no_default(name, capsys):
    for flags, environment in ((["--" + name, ""], {}),
                               ([], {"OQC_" + name.upper().replace("-", "_"): ""})):
        with pytest.raises(SystemExit) as ended:
            settings(*flags, **environment)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert f"argument --{name}: expected the name of a file, found nothing" in said


def test_a_mode_that_is_there_twice_is_one(ini):
    path = ini("[runtime a]\ncommand = true\nmodes = verbatim,verbatim")
    assert settings("--config", path).runtimes[0].modes == ("verbatim",)


def test_one_runtime_comes_from_the_environment_unless_a_flag_names_one():
    assert settings(OQC_RUNTIME="qpu=true").runtimes[0].name == "qpu"
    made = settings("--runtime", "a=true", OQC_RUNTIME="b=true")
    assert [spec.name for spec in made.runtimes] == ["a", "simulator", "echo"]
    assert settings(OQC_RUNTIME="").runtimes[0].name == "emulator"


@pytest.mark.parametrize("text, reason", [
    ("./qpu", "--runtime ./qpu: expected NAME=COMMAND"),
    ("qpu=", "--runtime qpu: expected a program and its arguments"),
    ("qpu=  ", "--runtime qpu: expected a program and its arguments"),
    ("qpu=''", "--runtime qpu: : no such program, or it is not"),
    ("qpu=./nothing-here",
     "--runtime qpu: ./nothing-here: no such program, or it is not executable"),
    ("qpu=/", "--runtime qpu: /: no such program, or it is not executable"),
    ("qpu='unclosed", "--runtime qpu: No closing quotation"),
    ("=true", "--runtime : a runtime's name is made of "),
    ("a b=true", "--runtime a b: a runtime's name is made of "),
    ("-a=true", "--runtime -a: a runtime's name is made of "),
    ("é=true", "--runtime é: a runtime's name is made of "),
    ("a" * 65 + "=true", "--runtime aaa"),
    ("emulator=true", "--runtime emulator: the name emulator is taken"),
    ("simulator=true", "--runtime simulator: the name simulator is taken"),
    ("echo=true", "--runtime echo: the name echo is taken")])
def test_an_invalid_runtime_is_one_line(text, reason):
    assert error(f"--runtime={text}").startswith(reason)


def test_a_runtime_that_is_not_executable_or_there_twice_is_one_line(script):
    program = script("exit 0")
    runtime = f"--runtime=a={program}"
    assert error(runtime, runtime) == "--runtime a: the name a is taken" + SAYS_MORE
    os.chmod(program, 0o644)
    assert error(runtime) == (
        f"--runtime a: {program}: no such program, or it is not executable{SAYS_MORE}")


def test_the_program_is_called_as_it_was_started(tmp_path):
    (tmp_path / "oqc.pyz").write_bytes(b"")
    inside = str(tmp_path / "oqc.pyz" / "oqc" / "config.py")
    assert config.program_name(inside, "./oqc.pyz") == "python3 ./oqc.pyz"
    assert config.program_name(inside, "my lab/oqc.pyz") == "python3 'my lab/oqc.pyz'"
    assert config.PROGRAM == "python3 -m oqc"


# The runtimes' file

def test_every_key_of_a_section_is_taken(ini, script):
    program = script("exit 0")
    made = settings("--config", ini(f"""
# the lab's machines
[runtime qpu-1]
command = {program} --device 1 'two words'     ; the left one
modes = verbatim, simulation
protocol = lines
slots = 1000
timeout = 0.25
retry_codes = 75, 3,255 ; busy
interrupted = fail
cwd = /
start_timeout = 90
warm = yes
attempts = 1
pause_after = 3
result_bytes = 8388608
log_bytes = 1024

[runtime qpu-2]
Command: {program}
"""))
    assert made.runtimes == (
        RuntimeSpec("qpu-1", (program, "--device", "1", "two words"), ("verbatim", "simulation"),
                    "lines", 1000, 0.25, (75, 3, 255), "fail",
                    90.0, True, 1, 3, 8 << 20, 1024, "/"),
        RuntimeSpec("qpu-2", (program,)),
        RuntimeSpec("echo", None, ("echo",), "echo"))


def test_what_a_section_leaves_out_has_the_documented_default(ini):
    assert settings("--config", ini("[runtime q]\ncommand = true")).runtimes[0] == RuntimeSpec(
        "q", ("true",), ("verbatim",), "exec", 1, 60.0, (75,), "retry",
        60.0, False, 5, 0, 1 << 20, 1 << 16)


def test_a_relative_program_is_looked_for_beside_the_file_then_on_path(ini, tmp_path, monkeypatch):
    other = tmp_path / "elsewhere"
    path = Path(ini(""))
    for program in (path.parent / "true", path.parent / "sub" / "drive", other / "mine"):
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\n", encoding="ascii")
        program.chmod(0o755)
    monkeypatch.chdir(other)

    def command(text):
        path.write_text(f"[runtime q]\ncommand = {text}\n", encoding="ascii")
        return settings("--config", os.path.relpath(path)).runtimes[0].command
    for text in ("true", "./true", "../$HERE/true", str(path.parent / "true")):
        assert command(text.replace("$HERE", path.parent.name)) == (str(path.parent / "true"),)
    assert command("sub/drive -x") == (str(path.parent / "sub" / "drive"), "-x")
    assert command("false ./true") == ("false", "./true")
    for text in ("mine", "./mine", "sub"):
        with pytest.raises(ConfigError, match="no such program"):
            command(text)
    assert settings("--runtime", "q=./mine").runtimes[0].command == (str(other / "mine"),)


def test_a_relative_working_directory_goes_from_the_folder_of_the_file(ini, tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = Path(ini("[runtime q]\ncommand = true\ncwd = data\n"))
    with pytest.raises(ConfigError, match=f"line 3: .*cwd: {path.parent}/data: no such directory"):
        settings("--config", str(path))
    (path.parent / "data").mkdir()
    assert settings("--config", str(path)).runtimes[0].cwd == str(path.parent / "data")


def test_a_percent_sign_and_a_number_sign_are_nothing_special(ini):
    spec = settings("--config", ini("[runtime q]\ncommand = true %h%(x)s #1 a;b")).runtimes[0]
    assert spec.command == ("true", "%h%(x)s", "#1", "a;b")


def test_an_empty_file_leaves_the_built_in_runtimes(ini):
    for text in ("", "\n\n", "; nothing\n# here\n"):
        assert settings("--config", ini(text)).runtimes == settings().runtimes


def test_runtimes_of_the_file_and_of_the_command_line_come_together(ini):
    path = ini("[runtime sim]\ncommand = true\nmodes = simulation")
    assert [spec.name for spec in settings("--config", path, "--runtime", "qpu=true").runtimes] == [
        "qpu", "sim", "echo"]
    path = ini("[runtime qpu]\ncommand = true")
    assert error("--config", path, "--runtime", "qpu=true").endswith(
        "line 1: [runtime qpu]: the name qpu is taken" + SAYS_MORE)


GOOD = "; first\n\n[runtime good]\ncommand = true\n\n"       # five lines before the one to blame

WRONG = {
    "an unknown key": ("[runtime a]\ncommand = true\nspeed = 9\n",
                       "line 8: [runtime a]: speed: unknown key; known are "
                       "command, modes, protocol, slots, timeout, start_timeout, warm, attempts, "
                       "retry_codes, pause_after, interrupted, cwd, result_bytes, log_bytes"),
    "name as a key": ("[runtime a]\nname = b\ncommand = true\n",
                      "line 7: [runtime a]: name: unknown key"),
    "an unknown mode": ("[runtime a]\ncommand = true\nmodes = verbatim, real\n",
                        "line 8: [runtime a]: modes: expected verbatim or simulation, "
                        "found 'real'"),
    "the mode echo": ("[runtime a]\ncommand = true\nmodes = echo\n",
                      "line 8: [runtime a]: modes: expected verbatim "),
    "no mode": ("[runtime a]\ncommand = true\nmodes =\n",
                "line 8: [runtime a]: modes: expected verbatim or "),
    "an unknown protocol": ("[runtime a]\ncommand = true\nprotocol = http\n",
                            "line 8: [runtime a]: protocol: expected exec or lines, found 'http'"),
    "no command": ("[runtime a]\nslots = 1\n",
                   "line 6: [runtime a]: command: expected a program and its arguments"),
    "an empty command": ("[runtime a]\nslots = 1\ncommand =\n",
                         "line 8: [runtime a]: command: expected a program and its arguments"),
    "an empty section": ("[runtime a]\n",
                         "line 6: [runtime a]: command: expected a program and its arguments"),
    "no such command": ("[runtime a]\ncommand = ./nothing-here -x\n",
                        "line 7: [runtime a]: command: ./nothing-here: "
                        "no such program, or it is not executable"),
    "an open quote": ("[runtime a]\ncommand = true 'x\n",
                      "line 7: [runtime a]: command: No closing quotation"),
    "start_timeout of exec": ("[runtime a]\ncommand = true\nstart_timeout = 9\n",
                              "line 8: [runtime a]: start_timeout: only with protocol = lines"),
    "warm of exec": ("[runtime a]\ncommand = true\nwarm = no\nprotocol = exec\n",
                     "line 8: [runtime a]: warm: only with protocol = lines"),
    "start_timeout 0": ("[runtime a]\ncommand = true\nstart_timeout = 0\n",
                        "line 8: [runtime a]: start_timeout: expected a number of seconds above 0"),
    "warm true": ("[runtime a]\ncommand = true\nwarm = true\n",
                  "line 8: [runtime a]: warm: expected yes or no, found 'true'"),
    "attempts 0": ("[runtime a]\ncommand = true\nattempts = 0\n",
                   "line 8: [runtime a]: attempts: expected a whole number from 1 to 1000, "
                   "found '0'"),
    "pause_after -1": ("[runtime a]\ncommand = true\npause_after = -1\n",
                       "line 8: [runtime a]: pause_after: expected a whole number from 0 to "
                       "1000000, found '-1'"),
    "result_bytes 1023": ("[runtime a]\ncommand = true\nresult_bytes = 1023\n",
                          "line 8: [runtime a]: result_bytes: expected a whole number from 1024 "
                          "to 8388608, found '1023'"),
    "log_bytes 8388609": ("[runtime a]\ncommand = true\nlog_bytes = 8388609\n",
                          "line 8: [runtime a]: log_bytes: expected a whole number from 1024 to "
                          "8388608, found '8388609'"),
    "slots 0": ("[runtime a]\ncommand = true\nslots = 0\n",
                "line 8: [runtime a]: slots: expected a whole number from 1 to 1000, found '0'"),
    "slots 1001": ("[runtime a]\ncommand = true\nslots = 1001\n",
                   "line 8: [runtime a]: slots: expected a whole "),
    "slots two": ("[runtime a]\ncommand = true\nslots = two\n",
                  "line 8: [runtime a]: slots: expected a whole "),
    "slots ٣": ("[runtime a]\ncommand = true\nslots = ٣\n",
                "line 8: [runtime a]: slots: expected a whole number "),
    "slots 1.0": ("[runtime a]\ncommand = true\nslots = 1.0\n",
                  "line 8: [runtime a]: slots: expected a whole number "),
    "slots 1 2": ("[runtime a]\ncommand = true\nslots = 1\n 2\n",
                  r"line 8: [runtime a]: slots: expected a whole "),
    "timeout 0": ("[runtime a]\ncommand = true\ntimeout = 0\n",
                  "line 8: [runtime a]: timeout: expected a number of seconds above 0, found '0'"),
    "timeout -1": ("[runtime a]\ncommand = true\ntimeout = -1\n",
                   "line 8: [runtime a]: timeout: expected a number of seconds"),
    "timeout 1m": ("[runtime a]\ncommand = true\ntimeout = 1m\n",
                   "line 8: [runtime a]: timeout: expected a number of seconds"),
    "timeout nan": ("[runtime a]\ncommand = true\ntimeout = nan\n",
                    "line 8: [runtime a]: timeout: expected a number of seconds"),
    "timeout inf": ("[runtime a]\ncommand = true\ntimeout = inf\n",
                    "line 8: [runtime a]: timeout: expected a number of seconds"),
    "timeout empty": ("[runtime a]\ncommand = true\ntimeout =\n",
                      "line 8: [runtime a]: timeout: expected a number of seconds"),
    "timeout 1_0": ("[runtime a]\ncommand = true\ntimeout = 1_0\n",
                    "line 8: [runtime a]: timeout: expected a number of seconds"),
    "retry code 0": ("[runtime a]\ncommand = true\nretry_codes = 0\n",
                     "line 8: [runtime a]: retry_codes: expected a whole number from 1 to 255, "
                     "found '0'"),
    "retry code 256": ("[runtime a]\ncommand = true\nretry_codes = 75, 256\n",
                       "line 8: [runtime a]: retry_codes: "),
    "retry code busy": ("[runtime a]\ncommand = true\nretry_codes = busy\n",
                        "line 8: [runtime a]: retry_codes: "),
    "interrupted": ("[runtime a]\ncommand = true\ninterrupted = maybe\n",
                    "line 8: [runtime a]: interrupted: expected retry or fail, found 'maybe'"),
    "another section": ("[server]\nport = 1\n",
                        "line 6: [server]: expected a section [runtime NAME]"),
    "DEFAULT": ("[DEFAULT]\nslots = 1\n", "line 6: [DEFAULT]: expected a section [runtime NAME]"),
    "no name": ("[runtime]\ncommand = true\n",
                "line 6: [runtime]: a runtime's name is made of letters, digits, "),
    "a bad name": ("[runtime a b]\ncommand = true\n",
                   "line 6: [runtime a b]: a runtime's name is made of letters, "),
    "a built-in name": ("[runtime echo]\ncommand = true\n",
                        "line 6: [runtime echo]: the name echo is taken"),
    "the name again": ("[runtime  good]\ncommand = true\n",
                       "line 6: [runtime  good]: the name good is taken"),
    "the section again": ("[runtime good]\ncommand = true\n",
                          "line 6: [runtime good]: is there twice"),
    "the key again": ("[runtime a]\ncommand = true\nslots = 1\nSlots = 2\n",
                      "line 9: [runtime a]: slots is there twi"),
    "no equals sign": ("[runtime a]\ncommand = true\nslots\n", "line 8: expected key = value"),
    "no key": ("[runtime a]\ncommand = true\n= 1\n", "line 8: expected key = value"),
    "a line separator in a name": ("[runtime a\u2028b]\ncommand = true\n",
                                   "line 6: [runtime a\u2028b]: a runtime's "),
    "a form feed in a name": ("[runtime a\fb]\ncommand = true\n",
                              "line 6: [runtime a\fb]: a runtime's name is "),
    "a form feed above": ("[runtime a]\ncommand = true \f\nslots = 0\n",
                          "line 8: [runtime a]: slots: expected a "),
    "no command, but the next has": ("[runtime a]\nslots = 1\n[runtime b]\ncommand = true\n",
                                     "line 6: [runtime a]: command: expected a program "),
    "a continued key": ("[runtime a]\ncommand = true\nslots\n 2\n", "line 8: expected key = value"),
}


@pytest.mark.parametrize("text, reason", WRONG.values(), ids=WRONG)
def test_whatever_is_wrong_in_the_file_is_one_line_with_the_file_the_line_and_the_section(
        ini, text, reason):
    path = ini(GOOD + text)
    said = error("--config", path)
    assert said.startswith(f"{path}: {reason}") and said.endswith(SAYS_MORE)


@pytest.mark.parametrize("text", [
    "command = true\n", "hello\n", "{}\n", '{"runtime": 1}', "\ufeff[runtime a]\n", "<xml/>",
    "[runtime a\ncommand = true\n", "  command = true\n", "]\n", "\0\0\0"])
def test_a_file_that_is_not_ini_is_one_line(ini, text):
    path = ini(text)
    assert error("--config", path).startswith(f"{path}: line 1: ")


def test_a_file_that_is_not_utf8_or_not_there_or_a_directory_is_one_line(ini, tmp_path):
    path = ini(b"[runtime a]\ncommand = caf\xe9\n")
    assert error("--config", path) == f"{path}: is not UTF-8 text{SAYS_MORE}"
    none = tmp_path / "none.ini"
    assert error("--config", none) == f"{none}: No such file or directory"
    assert error("--config", tmp_path) == f"{tmp_path}: Is a directory"


def test_runtimes_that_leave_verbatim_to_nobody_are_refused(ini):
    path = ini("[runtime sim]\ncommand = true\nmodes = simulation\n")
    assert error("--config", path) == (
        f"{path}: no runtime serves the mode verbatim; give one of them modes = verbatim"
        + SAYS_MORE)


# Keys

@pytest.fixture
def keys(tmp_path):
    """keys(data): the path of a keys file of mode 0600 with these bytes."""
    def write(data, mode=0o600):
        path = tmp_path / "keys"
        path.write_bytes(data)
        path.chmod(mode)
        return str(path)
    return write


def test_a_keys_file_has_a_name_and_a_key_a_line_and_replaces_the_documented_key(keys):
    path = keys(b"# who\n\nalice:user:a b:c=\nbob: caf\xe9 \r\nci.2:reader:$Yb;~|\n"
                b"alice: user : 2\n")
    assert settings("--keys-file", path).keys == (
        ("alice", "user", b"a b:c="), ("bob", "operator", b"caf\xe9"),
        ("ci.2", "reader", b"$Yb;~|"), ("alice", "user", b"2"))


@pytest.mark.parametrize("data, reason", [
    (b"", "holds no key; python3 -m oqc key NAME prints a line for it"),
    (b"# none\n\n", "holds no key; python3 -m oqc key NAME prints a line for it"),
    (b"a:1\nno-colon\n", "line 2: expected name:role:key, "),
    (b"a:\n", "line 1: expected name:role:key, "),
    (b"a:  \n", "line 1: expected name:role:key, "),
    (b":key\n", "line 1: expected name:role:key, "),
    (b"a b:key\n", "line 1: expected name:role:key, "),
    (b"\n\nb\xe9:key\n", "line 3: expected name:role:key, "),
    (b"a:k\0ey\n", "line 1: expected name:role:key, "),
    (b"a:k\x7fey\n", "line 1: expected name:role:key, "),
    (b"a:user:\n", "line 1: expected name:role:key, "),
    (b"a:users:key\n", "line 1: expected one of the roles reader, user, operator behind the name"),
    (b"a:b:c:key\n", "line 1: expected one of the roles reader, user, operator behind the name a"),
    (b"a:User:key\n", "line 1: expected one of the roles "),
    (b"a:1\nb:2\na:reader:3\n", "line 3: the name a has the role operator in a line before"),
    (b"a:1\nme:2\n", "line 2: me is no name for a key"),
    (b"oqc:user:key\n", "line 1: oqc is no name for a key"),
    (b"a:user:1\nb:reader:1\n", "line 2: the key of b is that of a, who has another role")])
def test_whatever_is_wrong_in_a_keys_file_is_one_line_that_shows_no_key(keys, data, reason):
    path = keys(data)
    line = error("--keys-file", path)
    assert line.startswith(f"{path}: {reason}") and "key\n" not in line


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_a_keys_file_that_others_may_use_is_refused(keys, mode):
    path = keys(b"a:1\n", mode)
    assert error("--keys-file", path) == f"{path}: others may read it; chmod 600 {path}"


def test_a_keys_file_that_is_not_there_or_a_directory_is_one_line(tmp_path):
    assert error("--keys-file", tmp_path / "none") == f"{tmp_path}/none: No such file or directory"
    assert error("--keys-file", tmp_path) == f"{tmp_path}: Is a directory"


def test_keys_come_from_systemd_and_from_the_environment_as_well(tmp_path, keys):
    (tmp_path / "oqc-keys").write_bytes(b"cred:1\n")
    assert settings(CREDENTIALS_DIRECTORY=str(tmp_path)).keys == (("cred", "operator", b"1"),)
    made = settings("--keys-file", keys(b"a:2\n"), CREDENTIALS_DIRECTORY=str(tmp_path))
    assert made.keys == (("a", "operator", b"2"),)
    made = settings(OQC_API_KEY="caf\udce9")
    assert made.keys == (("OQC_API_KEY", "operator", b"caf\xe9"),), "as the shell's bytes"
    made = settings("--keys-file", keys(b"a:2\n"), OQC_API_KEY="3")
    assert made.keys == (("a", "operator", b"2"), ("OQC_API_KEY", "operator", b"3"))
    made = settings("--keys-file", keys(b"a:user:2\n"), OQC_API_KEY="2")
    assert made.keys == (("a", "user", b"2"),), "a user's key does not become an operator's"
    made = settings(OQC_API_KEY="", CREDENTIALS_DIRECTORY=str(tmp_path / "none"))
    assert made.keys == (("documented", "operator", KEY.encode()),)


@pytest.mark.parametrize("host", [
    "0.0.0.0", "::", "192.0.2.1", "lab.example", "", "127.0.0.1.example"])
def test_an_address_that_others_reach_needs_keys_of_its_own(host, keys):
    assert error("--host", host).startswith(f"--host {host}: the documented key is public")
    assert settings("--host", host, "--keys-file", keys(b"a:1\n")).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_an_address_of_this_machine_alone_goes_with_the_documented_key(host):
    assert settings("--host", host).keys == (("documented", "operator", KEY.encode()),)


# As the program shows them

@pytest.mark.parametrize("flags, says", [
    (["--config", "none.ini"], "oqc: none.ini: No such file or directory"),
    (["--config", "bad.ini"], "oqc: bad.ini: line 3: [runtime a]: speed: unknown key; known are "),
    (["--config", "no.ini"], "oqc: no.ini: line 1: expected a section [runtime NAME]"),
    (["--runtime", "a\nb=true"],
     "oqc: --runtime a\\nb: a runtime's name is made of letters, digits, "),
    (["--runtime", "a=./nothing-here"], "oqc: --runtime a: ./nothing-here: no such program, "),
    (["--host", "0.0.0.0"], "oqc: --host 0.0.0.0: the documented key is public, "),
    (["--keys-file", "none"], "oqc: none: No such file or directory"),
    (["--tls-key", "none"], "oqc: --tls-key: needs --tls-cert beside it")])
def test_a_wrong_configuration_ends_the_program_with_78_and_one_line(tmp_path, flags, says):
    (tmp_path / "bad.ini").write_text("[runtime a]\ncommand = true\nspeed = 9\n", encoding="utf-8")
    (tmp_path / "no.ini").write_text("command = true\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OQC_")}
    ended = subprocess.run([sys.executable, "-m", "oqc", *flags], cwd=tmp_path, check=False,
                           capture_output=True, env={**environment, "PYTHONPATH": str(ROOT)},
                           timeout=30, text=True)
    assert (ended.returncode, ended.stdout) == (78, "")
    assert ended.stderr.startswith(says)
    assert ended.stderr.count("\n") == 1 and ended.stderr.endswith("\n")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["bad.ini", "no.ini"], "nothing was created"
