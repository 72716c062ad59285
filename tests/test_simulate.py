"""scripts/simulate.py: it finds a fault, and says the seed that repeats it."""
import subprocess
import sys

import pytest
from conftest import ROOT

# A queue that forgets whom it served: one submitter keeps all others waiting.
UNFAIR = """
import runpy, sys
from oqc import turns
turns._Runtime.served = property(lambda self: {}, lambda self, _: None)
sys.argv = ["simulate.py", "3", "7", "--steps", "200"]
runpy.run_path("scripts/simulate.py", run_name="__main__")
"""


def simulate(*arguments, timeout=100):
    """(exit status, standard output, standard error)."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False, timeout=timeout,
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_histories_of_the_scheduler_hold():
    status, out, error = simulate("scripts/simulate.py", "4", "7", "--steps", "200")
    assert (status, error) == (0, "")
    assert out == "4 histories of 200 steps, seeds 7 to 10: all held\n"


def test_a_fault_is_found_with_the_seed_that_repeats_it():
    status, out, error = simulate("-c", UNFAIR)
    assert (status, out) == (1, "")
    assert "its next was" in error
    assert "repeat it: scripts/simulate.py 1 7 --steps 200" in error


@pytest.mark.slow
def test_500_histories_hold():
    status, _, error = simulate("scripts/simulate.py", "500", "--steps", "300", timeout=1000)
    assert (status, error) == (0, "")
