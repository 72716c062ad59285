"""The physics of oqc.qubit against 2x2 matrices multiplied out here, formulas, and statistics."""
import hashlib
import json
import math
import random
from decimal import Decimal, localcontext

import pytest

from oqc import qubit
from oqc.qubit import Device

PERFECT = Device(t1_us=math.inf, t2_us=math.inf, pulse_ns=40.0, over_rotation=0.0,
                 readout_0=0.0, readout_1=0.0)
PAULI = {"X": ((0, 1), (1, 0)), "Y": ((0, -1j), (1j, 0)), "Z": ((1, 0), (0, -1))}


def random_job(dice, pulses):
    return ", ".join(f"{dice.choice('XYZ')}({dice.randrange(1000)})" for _ in range(pulses))


def multiplied_out(job):
    """The state by R = cos(theta / 2) 1 - i sin(theta / 2) P, matrix by matrix."""
    state = [1, 0]
    for pulse in job.split(", "):
        half = int(pulse[2:-1]) * math.pi / 360
        pauli = PAULI[pulse[0]]
        matrix = [[math.cos(half) * (row == column) - 1j * math.sin(half) * pauli[row][column]
                   for column in (0, 1)] for row in (0, 1)]
        state = [sum(matrix[row][column] * state[column] for column in (0, 1)) for row in (0, 1)]
    return state


def turned(after, before):
    """The product of two quaternions (w, x, y, z): rotations w 1 - i (x X + y Y + z Z)."""
    (w, x, y, z), (v, i, j, k) = after, before
    return (w * v - x * i - y * j - z * k, w * i + x * v + y * k - z * j,
            w * j - x * k + y * v + z * i, w * k + x * j - y * i + z * v)


def to_50_digits(pattern, times):
    """The state after a list of pulses, so many times over.

    By quaternions of decimals, raised to a power by squaring.
    """
    pi = Decimal("3.14159265358979323846264338327950288419716939937510582")
    with localcontext() as context:
        context.prec = 50
        whole = power = (Decimal(1), Decimal(0), Decimal(0), Decimal(0))
        for pulse in pattern:
            half = int(pulse[2:-1]) * pi / 360
            term, cosine, sine = Decimal(1), Decimal(0), Decimal(0)
            for power_of_half in range(0, 100, 2):      # Taylor's series, of angles up to 500°
                cosine, term = cosine + term, term * half / (power_of_half + 1)
                sine, term = sine + term, -term * half / (power_of_half + 2)
            power = turned((cosine, *(sine * (axis == pulse[0]) for axis in "XYZ")), power)
        while times:
            if times % 2:
                whole = turned(power, whole)
            power = turned(power, power)
            times //= 2
        w, x, y, z = (float(part) for part in whole)
        return complex(w, -z), complex(y, -x)


@pytest.mark.parametrize("job, p1, vector", [
    ("X(90)", 0.5, (0, -1, 0)),
    ("X(90), Z(90)", 0.5, (1, 0, 0)),
    ("X(90), Y(180), X(90)", 1, (0, 0, -1)),
    ("X(0)", 0, (0, 0, 1)),
    ("Y(90)", 0.5, (1, 0, 0)),
    ("X(360)", 0, (0, 0, 1)),
    ("Z(180), Y(180)", 1, (0, 0, -1))])
def test_the_table_of_the_design(job, p1, vector):
    found = qubit.simulation(job, 0, 1)
    assert found["probabilities"] == pytest.approx([1 - p1, p1], abs=1e-12)
    assert found["bloch"] == pytest.approx(vector, abs=1e-12)


def test_an_angle_of_three_digits():
    found = qubit.simulation("X(999)", 0, 1)
    p1 = found["probabilities"][1]
    assert p1 == pytest.approx((1 - math.cos(math.radians(999))) / 2, abs=1e-12)
    assert round(p1, 6) == 0.421783
    assert [round(value, 6) for value in found["bloch"]] == [0, 0.987688, 0.156434]


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
    expected = (math.cos(half) ** 2, math.sin(half) ** 2)
    assert (abs(a) ** 2, abs(b) ** 2) == pytest.approx(expected, abs=1e-12)
    assert abs(a) ** 2 + abs(b) ** 2 == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("pattern", [
    ["Z(120)"], ["X(300)"], ["Y(894)"], ["Z(842)", "Z(409)"], ["X(404)", "Y(10)"],
    random_job(random.Random(4), 1000).split(", ")], ids=lambda pattern: pattern[0])
def test_a_pattern_repeated_to_a_hundred_thousand_pulses_adds_up_no_error(pattern):
    """An error of a table's entry is the same each time it is used: 1e-16 would be 1e-11 here."""
    times = 100_000 // len(pattern)
    state = qubit.amplitudes(", ".join(pattern * times))
    assert state == pytest.approx(to_50_digits(pattern, times), abs=1e-12)


def test_half_turns_are_exact_and_nothing_is_shown_as_a_negative_zero():
    states = [((1, 0), (0, 0)), ((0, 0), (0, -1)), ((-1, 0), (0, 0)), ((0, 0), (0, 1))]
    for turns, (a, b) in enumerate(states):
        shown = qubit.simulation(f"X({180 * turns})", 0, 1)
        assert shown["statevector"] == [list(a), list(b)]
        assert shown["probabilities"] == [1 - turns % 2, turns % 2]
        assert "-0.0" not in json.dumps(shown)


def test_leading_zeros_do_not_change_a_pulse():
    assert qubit.amplitudes("Y(7), X(07), Z(007)") == qubit.amplitudes("Y(007), X(7), Z(07)")


def test_a_state_has_its_bloch_vector_whatever_its_norm():
    assert qubit.bloch(3, 3j) == pytest.approx((0, 1, 0), abs=1e-15)
    assert qubit.bloch(0, 0.001) == pytest.approx((0, 0, -1), abs=1e-15)


def test_the_path_goes_from_north_to_where_the_state_is():
    job = random_job(random.Random(3), 40)
    path = qubit.path(job)
    assert len(path) == 41 and path[0] == (0, 0, 1)
    pulses = job.split(", ")
    for number in range(1, 41):
        state = qubit.amplitudes(", ".join(pulses[:number]))
        assert path[number] == pytest.approx(qubit.bloch(*state), abs=1e-12)
    assert all(math.hypot(*vector) == pytest.approx(1, abs=1e-12) for vector in path)


def test_a_seed_gives_the_same_counts_on_every_python():
    assert qubit.simulation("X(90)", 1000, 5)["counts"] == {"0": 479, "1": 521}
    assert qubit.simulation("X(90)", 1000, 6)["counts"] != {"0": 479, "1": 521}
    device = PERFECT._replace(readout_1=0.5)    # counts are of what is read, not of what is there
    assert qubit.emulation("X(180)", 1000, 5, device)["counts"] == {"0": 479, "1": 521}
    assert qubit.simulation("X(0)", 1000, 5)["counts"] == {"0": 1000, "1": 0}
    assert qubit.simulation("X(180)", 1000, 5)["counts"] == {"0": 0, "1": 1000}


def test_the_members_of_a_simulation():
    assert list(qubit.simulation("X(90)", 10, 5)) == [
        "shots", "seed", "counts", "probabilities", "statevector", "bloch"]
    assert "counts" not in qubit.simulation("X(90)", 0, 5)


def chi_square(counts, probabilities):
    """Pearson's statistic of counts.

    With one degree of freedom it is over 10.83 with a probability of 0.001 (NIST/SEMATECH
    e-Handbook of Statistical Methods, section 1.3.6.7.4).
    """
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


@pytest.mark.parametrize("axis", "XY")
def test_a_phase_decays_with_t2(axis):
    device = PERFECT._replace(t2_us=10.0, pulse_ns=100.0)
    job = f"{axis}(90)" + ", X(0)" * 48 + f", {axis}(90)"       # x, or -y, turns into -z
    found = qubit.emulation(job, 0, 1, device)
    # the last pulse has moved it away from x and y before it relaxes
    length = math.exp(-49 * 0.1 / 10)
    assert found["probabilities"][1] == pytest.approx((1 + length) / 2, abs=1e-12)


def test_a_readout_error_moves_the_probabilities_alone():
    device = PERFECT._replace(readout_0=0.1, readout_1=0.2)
    for job, p1 in (("X(0)", 0.1), ("X(180)", 0.8)):
        found = qubit.emulation(job, 0, 1, device)
        assert found["probabilities"][1] == pytest.approx(p1, abs=1e-12)


def test_an_over_rotation_turns_x_and_y_too_far_and_z_not():
    device = PERFECT._replace(over_rotation=0.1)
    for axis in "XY":
        found = qubit.emulation(f"{axis}(100)", 0, 1, device)
        assert found["probabilities"][1] == pytest.approx(
            math.sin(math.radians(55)) ** 2, abs=1e-12)
    for axis in "XY":
        # Z(180) turns the second pulse around, so that it undoes the first; Z(198) would not
        found = qubit.emulation(f"{axis}(50), Z(180), {axis}(50)", 0, 1, device)
        assert found["probabilities"][1] == pytest.approx(0, abs=1e-12)


def test_a_virtual_z_takes_no_time():
    device = PERFECT._replace(t1_us=1.0, t2_us=1.0)
    turning = qubit.emulation("X(90)" + ", Z(360)" * 100, 0, 1, device)
    still = qubit.emulation("X(90)", 0, 1, device)
    assert turning["probabilities"] == pytest.approx(still["probabilities"], abs=1e-12)


@pytest.mark.parametrize("given, shown", [
    (1.0000000001, "1.0000000001"), (1234567.5, "1234567.5"), (5.0, "5"), (-3.0, "-3"),
    (math.nan, "nan"), (1e300, "1e+300")])
def test_an_invalid_parameter_is_named_as_it_was_given(given, shown):
    with pytest.raises(ValueError, match=f", not {shown.replace('+', '[+]')}$"):
        Device(readout_0=given).check()


def test_no_result_has_a_negative_zero():
    dice = random.Random(5)
    device = PERFECT._replace(over_rotation=-0.0)
    for number in range(300):
        job = random_job(dice, 1 + number % 5)
        for result in (qubit.simulation(job, 5, 1), qubit.emulation(job, 5, 1, device)):
            assert "-0.0," not in json.dumps(result) and "-0.0}" not in json.dumps(result)


def test_the_last_digit_is_the_same_on_every_python():
    """Where math.hypot differs between Python 3.9 and 3.13; the digest is of both."""
    dice = random.Random(3)
    found = [qubit.amplitudes(random_job(dice, 1 + number % 40)) for number in range(2000)]
    digest = hashlib.sha256(repr(found).encode()).hexdigest()
    assert digest == "df00361d583730645f71e6d3d9d71d66d23193496bb8682379acb8e7d0c4cffd"


def test_an_emulation_tells_the_device_and_an_infinite_time_as_null():
    found = qubit.emulation("X(90)", 10, 5, PERFECT)
    assert list(found) == ["shots", "seed", "counts", "probabilities", "device"]
    assert found["device"] == {**PERFECT._asdict(), "t1_us": None, "t2_us": None}
    assert list(found["device"]) == list(Device._fields)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    without_shots = qubit.emulation("X(90)", 0, 5, PERFECT)
    assert list(without_shots) == ["shots", "seed", "probabilities", "device"]


def test_a_probability_is_from_0_to_1_after_many_pulses_on_a_perfect_device():
    for angle in range(0, 1000, 20):
        for p in qubit.emulation(", ".join([f"X({angle})"] * 720), 0, 1, PERFECT)["probabilities"]:
            assert 0 <= p <= 1


@pytest.mark.parametrize("changed, expected", [
    ({"t1_us": 0.0}, "more than 0 microseconds, inf for no decay, not 0"),
    ({"t1_us": -1.0}, "more than 0 microseconds, inf for no decay, not -1"),
    ({"t2_us": 0.0}, "more than 0 microseconds, and at most twice t1_us, not 0"),
    ({"t1_us": 1.0, "t2_us": 2.1}, "more than 0 microseconds, and at most twice t1_us, not 2.1"),
    ({"t1_us": 1.0, "t2_us": math.inf},
     "more than 0 microseconds, and at most twice t1_us, not inf"),
    ({"pulse_ns": -1.0}, "0 nanoseconds or more, and finite, not -1"),
    ({"pulse_ns": math.inf}, "0 nanoseconds or more, and finite, not inf"),
    ({"over_rotation": 1.1}, "a share from -1 to 1, not 1.1"),
    ({"over_rotation": -math.inf}, "a share from -1 to 1, not -inf"),
    ({"readout_0": -0.1}, "a probability from 0 to 1, not -0.1"),
    ({"readout_0": math.inf}, "a probability from 0 to 1, not inf"),
    ({"readout_1": 1.1}, "a probability from 0 to 1, not 1.1"),
    ({"readout_1": -0.1}, "a probability from 0 to 1, not -0.1")], ids=str)
def test_a_device_that_cannot_be_is_refused_with_the_name_of_what_is_wrong(changed, expected):
    with pytest.raises(ValueError) as refused:
        Device(**{**Device()._asdict(), **changed}).check()
    assert str(refused.value) == f"{list(changed)[-1]}: expected {expected}"


@pytest.mark.parametrize("name", Device._fields)
def test_what_is_no_number_is_refused_in_every_parameter(name):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, not nan$"):
        Device()._replace(**{name: math.nan}).check()


def test_the_default_device_can_be():
    Device().check()
    PERFECT.check()
    Device(t1_us=10.0, t2_us=20.0, pulse_ns=0.0, over_rotation=-1.0,
           readout_0=1.0, readout_1=1.0).check()
