"""What the tests share, on tests of their own."""
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

FIRST = """
import threading
import pytest

def hangs_and_catches_much():
    while True:
        try:
            threading.Event().wait()
        except Exception:
            pass

def hangs_beside():
    threading.Event().wait()

def test_before():
    pass

def test_that_hangs():
    threading.Thread(target=hangs_beside, daemon=True).start()
    hangs_and_catches_much()

@pytest.mark.slow
def test_that_is_slow():
    threading.Event().wait(0.8)

def test_after():
    pass
"""
SECOND = """
import threading
import pytest

@pytest.fixture
def hangs_in_the_end():
    yield
    threading.Event().wait()

def test_whose_fixture_hangs(hangs_in_the_end):
    pass

def test_after():
    pass
"""


@pytest.fixture
def suite(tmp_path):
    """suite(*flags): run pytest on two files of tests with what is set here; (status, output)."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    (tmp_path / "tests" / "test_first.py").write_text(FIRST, encoding="utf-8")
    (tmp_path / "tests" / "test_second.py").write_text(SECOND, encoding="utf-8")

    def run(*flags):
        ended = subprocess.run([sys.executable, "-m", "pytest", "-m", "slow or not slow", *flags],
                               cwd=tmp_path, check=False, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, timeout=100)
        return ended.returncode, ended.stdout
    return run


@pytest.mark.parametrize("how", [(), ("--maxfail=9",)], ids=["in several processes", "in one"])
def test_a_test_that_hangs_fails_with_the_stacks_of_its_threads_and_the_others_go_on(suite, how):
    status, output = suite("-o", "faulthandler_timeout=0.6", *how)
    assert status == 1
    assert "1 failed, 5 passed, 1 error in" in output, output
    failures, _, summary = output.partition("short test summary info")
    assert "FAILED tests/test_first.py::test_that_hangs" in summary
    assert "ERROR tests/test_second.py::test_whose_fixture_hangs" in summary
    assert failures.count("not ended within 0.6 s; where its threads are:") == 2
    for function in ("hangs_and_catches_much", "hangs_beside", "hangs_in_the_end"):
        assert re.search(f'File ".*", line [0-9]+ in {function}\n', failures), output


DEAF = """
import signal
import time

def test_that_hears_no_signal():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(60)
"""


@pytest.mark.parametrize("how", [(), ("--maxfail=9",)], ids=["in several processes", "in one"])
def test_a_test_that_hangs_and_hears_no_signal_ends_the_run(suite, tmp_path, how):
    (tmp_path / "tests" / "test_first.py").write_text(DEAF, encoding="utf-8")
    status, output = suite("-o", "faulthandler_timeout=0.2", *how)
    assert status != 0 and "in test_that_hears_no_signal" in output, output


IGNORED = ("HUP", "INT", "QUIT", "TERM", "CHLD")


def test_what_is_ignored_where_the_tests_are_started_is_not_ignored_in_what_they_start():
    """As after nohup, and in the background of a shell."""
    tests = "import conftest, subprocess; subprocess.run(['grep', 'SigIgn', '/proc/self/status'])"
    ended = subprocess.run(
        ["env", f"--ignore-signal={','.join(IGNORED)}", sys.executable, "-c", tests], check=True,
        cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True, timeout=60)
    bits = int(ended.stdout.split()[1], 16)         # the lowest is that of signal 1
    assert [name for name in IGNORED if bits >> signal.Signals[f"SIG{name}"] - 1 & 1] == []
