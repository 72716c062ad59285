"""The physics of oqc.qubit against 2x2 complex matrices multiplied out here, closed formulas, and statistics."""
import math
import random

import pytest

from oqc import qubit
from oqc.qubit import Device

PERFECT = Device(t1_us=math.inf, t2_us=math.inf, pulse_ns=40.0, over_rotation=0.0, readout_0=0.0, readout_1=0.0)
PAULI = {"X": ((0, 1), (1, 0)), "Y": ((0, -1j), (1j, 0)), "Z": ((1, 0), (0, -1))}


def random_job(dice, pulses):
    return ", ".join(f"{dice.choice('XYZ')}({dice.randrange(1000)})" for _ in range(pulses))


def multiplied_out(job):
    """The state by R = cos(theta / 2) 1 - i sin(theta / 2) P, matrix by matrix."""
    state = [1, 0]
    for pulse in job.split(", "):
        half = int(pulse[2:-1]) * math.pi / 360
        matrix = [[math.cos(half) * (row == column) - 1j * math.sin(half) * PAULI[pulse[0]][row][column]
                   for column in (0, 1)] for row in (0, 1)]
        state = [sum(matrix[row][column] * state[column] for column in (0, 1)) for row in (0, 1)]
    return state


@pytest.mark.parametrize("job, p1, vector", [
    ("X(90)", 0.5, (0, -1, 0)), ("X(90), Z(90)", 0.5, (1, 0, 0)), ("X(90), Y(180), X(90)", 1, (0, 0, -1)),
    ("X(0)", 0, (0, 0, 1)), ("Y(90)", 0.5, (1, 0, 0)), ("X(360)", 0, (0, 0, 1)), ("Z(180), Y(180)", 1, (0, 0, -1))])
def test_the_table_of_the_design(job, p1, vector):
    found = qubit.simulation(job, 0, 1)
    assert found["probabilities"] == pytest.approx([1 - p1, p1], abs=1e-12)
    assert found["bloch"] == pytest.approx(vector, abs=1e-12)


def test_an_angle_of_three_digits():
    found = qubit.simulation("X(999)", 0, 1)
    assert found["probabilities"][1] == pytest.approx((1 - math.cos(math.radians(999))) / 2, abs=1e-12)
    assert [round(found["probabilities"][1], 6), *(round(value, 6) for value in found["bloch"])] == [
        0.421783, 0, 0.987688, 0.156434]


@pytest.mark.parametrize("seed", range(50))
def test_random_jobs_are_what_matrices_multiplied_out_give(seed):
    job = random_job(random.Random(seed), 1 + seed)
    assert qubit.amplitudes(job) == pytest.approx(multiplied_out(job), abs=1e-12)


def test_every_pulse_is_exact():
    for axis in "XYZ":
        for angle in range(1000):
            job = f"Y(77), {axis}({angle})"
            assert qubit.amplitudes(job) == pytest.approx(multiplied_out(job), abs=1e-14)


@pytest.mark.parametrize("axis", "XY")
def test_a_hundred_thousand_pulses_lose_no_exactness(axis):
    a, b = qubit.amplitudes(", ".join([f"{axis}(7)"] * 100_000))
    half = math.radians(700_000 % 720 / 2)      # they add up to one rotation
    assert (abs(a) ** 2, abs(b) ** 2) == pytest.approx((math.cos(half) ** 2, math.sin(half) ** 2), abs=1e-12)
    assert abs(a) ** 2 + abs(b) ** 2 == pytest.approx(1, abs=1e-15)


def test_the_path_goes_from_north_to_where_the_state_is():
    job = random_job(random.Random(3), 40)
    path = qubit.path(job)
    assert len(path) == 41 and path[0] == (0, 0, 1)
    assert path[-1] == pytest.approx(qubit.bloch(*qubit.amplitudes(job)), abs=1e-12)
    assert all(math.hypot(*vector) == pytest.approx(1, abs=1e-12) for vector in path)


def test_a_seed_gives_the_same_counts_on_every_python():
    assert qubit.simulation("X(90)", 1000, 5)["counts"] == {"0": 479, "1": 521}
    assert qubit.simulation("X(90)", 1000, 6)["counts"] != {"0": 479, "1": 521}


def test_the_members_of_a_simulation():
    assert list(qubit.simulation("X(90)", 10, 5)) == [
        "shots", "seed", "counts", "probabilities", "statevector", "bloch"]
    assert "counts" not in qubit.simulation("X(90)", 0, 5)


def chi_square(counts, probabilities):
    """Pearson's statistic of counts; over 10.83 has a probability of 0.001 with one degree of freedom (NIST/SEMATECH
    e-Handbook of Statistical Methods, section 1.3.6.7.4)."""
    shots = sum(counts.values())
    return sum((counts[bit] - shots * p) ** 2 / (shots * p) for bit, p in zip("01", probabilities))


@pytest.mark.parametrize("seed", range(8))
def test_a_device_without_errors_counts_what_the_simulator_computes(seed):
    job = random_job(random.Random(seed), 30)
    exact, found = qubit.simulation(job, 0, 1), qubit.emulation(job, 100_000, seed, PERFECT)
    assert found["probabilities"] == pytest.approx(exact["probabilities"], abs=1e-9)
    assert chi_square(found["counts"], exact["probabilities"]) < 10.83


def test_that_statistic_finds_a_device_that_has_errors():
    found = qubit.emulation("X(180)", 100_000, 1, PERFECT._replace(readout_1=0.3))
    assert chi_square(found["counts"], (0.28, 0.72)) > 10.83


def test_an_excited_qubit_decays_with_t1():
    device = PERFECT._replace(t1_us=10.0, t2_us=20.0, pulse_ns=100.0)
    found = qubit.emulation("X(180)" + ", X(0)" * 49, 0, 1, device)
    assert found["probabilities"][1] == pytest.approx(math.exp(-50 * 0.1 / 10), abs=1e-12)


def test_a_phase_decays_with_t2():
    device = PERFECT._replace(t2_us=10.0, pulse_ns=100.0)
    found = qubit.emulation("Y(90)" + ", X(0)" * 48 + ", Y(90)", 0, 1, device)      # x turns into -z, then is read
    length = math.exp(-50 * 0.1 / 10) / math.exp(-0.1 / 10)                         # the last pulse moves it out of x
    assert found["probabilities"][1] == pytest.approx((1 + length) / 2, abs=1e-12)


def test_a_readout_error_moves_the_probabilities_alone():
    device = PERFECT._replace(readout_0=0.1, readout_1=0.2)
    assert qubit.emulation("X(0)", 0, 1, device)["probabilities"][1] == pytest.approx(0.1, abs=1e-12)
    assert qubit.emulation("X(180)", 0, 1, device)["probabilities"][1] == pytest.approx(0.8, abs=1e-12)


def test_an_over_rotation_turns_x_and_y_too_far_and_z_not():
    device = PERFECT._replace(over_rotation=0.1)
    for axis in "XY":
        assert qubit.emulation(f"{axis}(100)", 0, 1, device)["probabilities"][1] == pytest.approx(
            math.sin(math.radians(55)) ** 2, abs=1e-12)
    plain = qubit.emulation("X(50), Z(100), X(50)", 0, 1, device._replace(over_rotation=0.0))
    assert qubit.emulation("X(50), Z(100)", 0, 1, PERFECT)["probabilities"] == qubit.emulation(
        "X(50)", 0, 1, PERFECT)["probabilities"]
    assert plain["probabilities"] == pytest.approx(qubit.simulation("X(50), Z(100), X(50)", 0, 1)["probabilities"])


def test_a_virtual_z_takes_no_time():
    device = PERFECT._replace(t1_us=1.0, t2_us=1.0)
    assert qubit.emulation("X(90)" + ", Z(360)" * 100, 0, 1, device)["probabilities"] == pytest.approx(
        qubit.emulation("X(90)", 0, 1, device)["probabilities"], abs=1e-12)


def test_an_emulation_tells_the_device_and_an_infinite_time_as_null():
    found = qubit.emulation("X(90)", 10, 5, PERFECT)
    assert list(found) == ["shots", "seed", "counts", "probabilities", "device"]
    assert found["device"] == {**PERFECT._asdict(), "t1_us": None, "t2_us": None}


@pytest.mark.parametrize("changed", [
    {"t1_us": 0.0}, {"t1_us": -1.0}, {"t2_us": 0.0}, {"t1_us": 1.0, "t2_us": 2.1}, {"pulse_ns": -1.0},
    {"pulse_ns": math.inf}, {"over_rotation": 1.1}, {"over_rotation": math.nan}, {"readout_0": -0.1},
    {"readout_1": 1.1}])
def test_a_device_that_cannot_be_is_refused_with_the_name_of_what_is_wrong(changed):
    with pytest.raises(ValueError, match=list(changed)[-1]):
        Device(**{**Device()._asdict(), **changed}).check()


def test_the_default_device_can_be():
    Device().check()
    PERFECT.check()
