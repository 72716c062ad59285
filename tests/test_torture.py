"""The kill loop of scripts/torture.sh: a few rounds here, two hundred where it has the time."""
import subprocess

import pytest
from conftest import ROOT


def torture(kills, seed):
    """The summary of a run; fails with what it found."""
    done = subprocess.run([str(ROOT / "scripts" / "torture.sh"), str(kills), str(seed)],
                          check=False, capture_output=True, text=True, timeout=1200)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_server_that_is_killed_again_and_again_loses_nothing():
    assert "nothing lost, nothing twice, integrity_check ok" in torture(3, 7)


@pytest.mark.slow
def test_a_server_that_is_killed_two_hundred_times_loses_nothing():
    assert "200 kills" in torture(200, 8)
