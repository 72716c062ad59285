"""The bundled runtimes: programs over the protocol lines, on the command line and in a slot."""
import contextlib
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from oqc import builtin, runtimes
from oqc.clock import Clock
from oqc.jobs import RuntimeSpec, Task


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                          check=False, timeout=60, **options)


def oqc(*arguments, **options):
    return python("-m", "oqc", *arguments, **options)


@pytest.mark.parametrize("name", ["emulator", "simulator"])
def test_a_built_in_runtime_answers_lines_on_the_command_line(name):
    question = {"id": 1, "job": "X(90)", "mode": "verbatim", "attempt": 1, "shots": 10, "seed": 1}
    ran = oqc(name, input=2 * (json.dumps(question) + "\n"))
    first, second = (json.loads(line) for line in ran.stdout.splitlines())
    assert (first["return_code"], first["runtime_error"], first["result"]["shots"]) == (0, None, 10)
    assert first == second
    assert first["id"] == 1
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("line, reason", [
    ("X(90)", "Expecting value: "),
    ("\udcff", "'utf-8' codec can't decode"),
    ("", "Expecting value: "),
    ("[" * 100_000, ""),
    ('["X(90)"]', "expected an object"),
    ("{}", "job: missing"),
    ('{"job": "X(90); Y(1)"}', "job: at character 6: "),
    ('{"job": "X(9)", "shots": NaN}', "NaN"),
    ('{"job": "X(9)", "seed": "7"}', "seed: expected a whole number "),
], ids=lambda value: value[:12])
def test_a_line_that_is_no_job_is_65_with_the_reason_and_the_next_is_answered(line, reason):
    ran = oqc("simulator", input=line + '\n{"job": "X(180)", "shots": 0}\n', encoding="utf-8",
              errors="surrogateescape")
    refused, answered = map(json.loads, ran.stdout.splitlines())
    assert refused["return_code"] == 65
    assert refused["runtime_error"].startswith(f"not a job: {reason}")
    assert answered["result"]["probabilities"] == [0.0, 1.0]
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_emulator_says_which_parameters_it_has_and_refuses_others():
    told = oqc("emulator", "--help")
    assert told.returncode == 0
    assert "--t1-us" in told.stdout
    refused = oqc("emulator", "--no-such-parameter", "1")
    assert (refused.returncode, refused.stdout) == (2, "")


@pytest.mark.parametrize("name", ["emulator", "simulator"])
def test_a_built_in_runtime_runs_in_a_slot(name):
    spec = RuntimeSpec(name, builtin.command(name), protocol="lines")
    with contextlib.closing(runtimes.slot(spec, Clock(), 20.0)) as slot:
        outcome = slot.run(Task(7, "X(90)", "verbatim", 2, 100, 42, 0), lambda: False)
    assert outcome.return_code == 0
    assert json.loads(outcome.result)["shots"] == 100


def test_a_child_imports_no_room_of_the_server():
    """Each slot has one all the time: imports are its memory, and the time that it starts in."""
    look = ("import sys, oqc.builtin\n"
            "print(*sorted(name for name in sys.modules if name.startswith('oqc')))")
    assert python("-c", look).stdout.split() == ["oqc", "oqc.builtin", "oqc.jobs", "oqc.qubit"]
