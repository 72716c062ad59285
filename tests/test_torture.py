"""The kill loop of scripts/torture.sh: a few rounds here, two hundred where it has the time."""
import re
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
    assert "nothing lost, nothing twice, integrity_check ok" in torture(5, 7)


@pytest.mark.slow
def test_a_server_that_is_killed_two_hundred_times_loses_nothing():
    said = torture(200, 8)
    assert "200 kills" in said
    assert re.search("acts of a person: remove_wal [1-9].*, link [1-9].*, restore [1-9]", said)
