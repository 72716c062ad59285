"""The job as data: its pattern, what is said where a string leaves it, members, transitions."""
import itertools
import json

import pytest

from oqc import jobs
from oqc.jobs import Malformed, Outcome, RetryPolicy, Submission

SEED_MOST = 2 ** 63 - 1
ANGLES = '")" after an angle of 1 to 3 digits (whole degrees)'
NEXT = '", " and a pulse such as X(90)'


@pytest.mark.parametrize("text", [
    "X(0)", "X(90), Y(180), X(90)", "Z(180), Y(180)", "X(0), Y(0), X(0)", "Z(007)", "X(999)",
    "Y(1)", ", ".join(["X(90)"] * 100_000)], ids=lambda text: text[:12])
def test_every_string_of_the_documented_pattern_is_a_job(text):
    assert jobs.parse({"job": text, "mode": "echo"}) == Submission(text, "echo")


@pytest.mark.parametrize("text, character, expected, found", [
    ("", 1, "a pulse such as X(90)", "the end"),
    ("\n", 1, "a pulse such as X(90)", r'"\n"'),
    (" X(90)", 1, "a pulse such as X(90)", '" "'),
    ("x(90)", 1, "a pulse such as X(90)", '"x"'),
    ("H(90)", 1, "a pulse such as X(90)", '"H"'),
    ("X", 2, '"(" and an angle such as X(90)', "the end"),
    ("X90", 2, '"(" and an angle such as X(90)', '"9"'),
    ("X (90)", 2, '"(" and an angle such as X(90)', '" "'),
    ("X(", 3, "an angle of 1 to 3 digits (whole degrees)", "the end"),
    ("X()", 3, "an angle of 1 to 3 digits (whole degrees)", '")"'),
    ("X(-90)", 3, "an angle of 1 to 3 digits (whole degrees)", '"-"'),
    ("X(+90)", 3, "an angle of 1 to 3 digits (whole degrees)", '"+"'),
    ("X(٣)", 3, "an angle of 1 to 3 digits (whole degrees)", r'"\u0663"'),
    ("X(９)", 3, "an angle of 1 to 3 digits (whole degrees)", r'"\uff19"'),
    ("X(1٣)", 4, ANGLES, r'"\u0663"'),
    ("X(9.5)", 4, ANGLES, '"."'),
    ("X(90", 5, ANGLES, "the end"),
    ("X(1234)", 6, ANGLES, '"4"'),
    ("X(90)\n", 6, NEXT, r'"\n"'),
    ("X(90) ", 6, NEXT, '" "'),
    ("X(90),Y(90)", 6, NEXT, '","'),
    ("X(90)Y(90)", 6, NEXT, '"Y"'),
    ("X(90)\0", 6, NEXT, r'"\u0000"'),
    ("X(90)\ud800", 6, NEXT, r'"\ud800"'),
    ("X(180); Y(90)", 7, NEXT, '";"'),
    ("X(90), ", 8, "a pulse such as X(90)", "the end"),
    ("X(90),  Y(90)", 8, "a pulse such as X(90)", '" "'),
    ("X(90), y(90)", 8, "a pulse such as X(90)", '"y"'),
    ("X(90), Y90", 9, '"(" and an angle such as X(90)', '"9"'),
    ("X(90), Y(a)", 10, "an angle of 1 to 3 digits (whole degrees)", '"a"'),
    ("X(90), Y(1000)", 13, ANGLES, '"0"'),
    ("X(90), Y(180), X(90)\n", 21, NEXT, r'"\n"'),
    ("X(90), " * 50_000 + "Q", 350_001, "a pulse such as X(90)", '"Q"'),
], ids=lambda value: repr(value)[:16])
def test_a_job_of_another_shape_is_refused_with_the_character_and_what_may_stand_there(
        text, character, expected, found):
    with pytest.raises(Malformed) as refused:
        jobs.parse({"job": text, "mode": "verbatim"})
    assert str(refused.value) == (
        f"job: at character {character}: expected {expected}, found {found}")


def test_the_reason_for_a_refusal_is_the_one_that_the_issue_shows():
    assert jobs.explain("X(180);") == (
        'job: at character 7: expected ", " and a pulse such as X(90), found ";"')


@pytest.mark.parametrize("mode", ["verbatim", "simulation", "echo"])
def test_each_of_the_three_modes_is_a_mode(mode):
    assert jobs.parse({"job": "X(0)", "mode": mode}) == Submission("X(0)", mode, 1000, None, 0)


@pytest.mark.parametrize("member, value", [
    ("shots", 0), ("shots", 1), ("shots", 1_000_000), ("seed", 0), ("seed", 1), ("seed", SEED_MOST),
    ("return_code", 0), ("return_code", 1), ("return_code", 255)])
def test_an_optional_member_is_taken_up_to_its_bounds(member, value):
    parsed = jobs.parse({"job": "X(0)", "mode": "echo", member: value})
    assert parsed == Submission("X(0)", "echo")._replace(**{member: value})


def test_a_number_whose_fraction_is_zero_is_whole():
    members = {"shots": 1.0, "seed": 2.0, "return_code": -0.0}
    parsed = jobs.parse({"job": "X(0)", "mode": "echo", **members})
    assert repr(parsed) == repr(Submission("X(0)", "echo", 1, 2, 0))


@pytest.mark.parametrize("member, most", [
    ("shots", 1_000_000), ("seed", SEED_MOST), ("return_code", 255)])
def test_an_optional_member_is_refused_outside_its_bounds_and_as_anything_but_a_whole_number(
        member, most):
    for value, found in (
            (-1, "-1"), (most + 1, str(most + 1)), (10 ** 100, str(10 ** 100)[:40]),
            (0.5, "a number with a fraction"), (-1.0, "-1"), (1e300, str(int(1e300))[:40]),
            ("1", "text"), (None, "null"), (True, "true or false"), ([1], "an array"),
            ({}, "an object")):
        with pytest.raises(Malformed) as refused:
            jobs.parse({"job": "X(0)", "mode": "echo", member: value})
        assert str(refused.value) == (
            f"{member}: expected a whole number from 0 to {most}, found {found}")


@pytest.mark.parametrize("text, number", [
    ("1", 1), ("9", 9), ("007", 7), ("0", None), ("10", None), ("", None), ("x", None),
    ("+1", None), ("-1", None), ("1.0", None), (" 1", None), ("1\n", None), ("1_0", None),
    ("\u0663", None),
    ("0" * 18 + "1", 1), ("0" * 19 + "1", None)])
def test_a_whole_number_in_text_is_ascii_digits_within_its_bounds(text, number):
    if number is None:
        with pytest.raises(ValueError) as refused:
            jobs.whole_number(text, 1, 9)
        assert str(refused.value) == "expected a whole number from 1 to 9"
    else:
        assert jobs.whole_number(text, 1, 9) == number


TAG_EXPECTED = ("tag: expected 1 to 64 letters, digits, '.', '_' or '-', beginning with a "
                "letter or digit, found ")


@pytest.mark.parametrize("value, reason", [
    ("X(90)", "expected an object with job and mode, found text"),
    (7, "expected an object with job and mode, found a number"),
    (True, "expected an object with job and mode, found true or false"),
    (None, "expected an object with job and mode, found null"),
    ({}, "job: missing; a job has the members job and mode"),
    ({"mode": "echo"}, "job: missing; a job has the members job and mode"),
    ({"job": "X(0)"}, "mode: missing; a job has the members job and mode"),
    ({"job": 90, "mode": "echo"}, "job: expected text, found a number"),
    ({"job": None, "mode": "echo"}, "job: expected text, found null"),
    ({"job": ["X(0)"], "mode": "echo"}, "job: expected text, found an array"),
    ({"job": "X(0)", "mode": None}, "mode: expected text, found null"),
    ({"job": "X(0)", "mode": ["echo"]}, "mode: expected text, found an array"),
    ({"job": "X(0)", "mode": {}}, "mode: expected text, found an object"),
    ({"job": "X(0)", "mode": 0.5}, "mode: expected text, found a number with a fraction"),
    ({"job": "X(0)", "mode": "Echo"}, 'mode: expected verbatim, simulation or echo, found "Echo"'),
    ({"job": "X(0)", "mode": ""}, 'mode: expected verbatim, simulation or echo, found ""'),
    ({"job": "X(0)", "mode": "echo\n"},
     r'mode: expected verbatim, simulation or echo, found "echo\n"'),
    ({"job": "X(0)", "mode": "echo", "color": 1},
     'unknown member "color": allowed are job, mode, shots, seed, return_code, tag, note, runtime, '
     'priority'),
    ({"job": "X(0)", "mode": "echo", "tag": None}, TAG_EXPECTED + "null"),
    ({"job": "X(0)", "mode": "echo", "tag": 7}, TAG_EXPECTED + "a number"),
    ({"job": "X(0)", "mode": "echo", "tag": ""}, TAG_EXPECTED + '""'),
    ({"job": "X(0)", "mode": "echo", "tag": "-a"}, TAG_EXPECTED + '"-a"'),
    ({"job": "X(0)", "mode": "echo", "tag": "a b"}, TAG_EXPECTED + '"a b"'),
    ({"job": "X(0)", "mode": "echo", "tag": "a\n"}, TAG_EXPECTED + r'"a\n"'),
    ({"job": "X(0)", "mode": "echo", "tag": "\u00e9"}, TAG_EXPECTED + r'"\u00e9"'),
    ({"job": "X(0)", "mode": "echo", "tag": "a" * 65}, TAG_EXPECTED + f'"{"a" * 65}"'),
    ({"job": "X(0)", "mode": "echo", "note": None}, "note: expected an object, found null"),
    ({"job": "X(0)", "mode": "echo", "note": "A"}, "note: expected an object, found text"),
    ({"job": "X(0)", "mode": "echo", "note": [1]}, "note: expected an object, found an array"),
    ({"job": "X(0)", "mode": "echo", "note": {"a": "b" * 1020}},
     "note: expected 1024 bytes of JSON at most, found 1029"),
    ({"job": "X(0)", "mode": "echo", "note": {"a": "\ud800"}},
     "note: half of a surrogate pair is no text"),
    ({"job": "X(0)", "mode": "echo", "note": {"a": float("inf")}},
     "note: a number is too large, or it is nested too deeply"),
    ({"job": "X(0)", "mode": "verbatim", "return_code": 1},
     "return_code: allowed only with the mode echo"),
    ({"job": "X(0)", "mode": "simulation", "return_code": 0},
     "return_code: allowed only with the mode echo"),
], ids=lambda value: repr(value)[:40])
def test_what_is_not_a_job_is_refused_with_its_reason(value, reason):
    with pytest.raises(Malformed) as refused:
        jobs.parse(value)
    assert str(refused.value) == reason


def test_a_tag_and_a_note_are_kept_as_they_are():
    longest = {"a": "\u00e9" * 507 + "b"}       # 1024 bytes of UTF-8
    for tag, note in (("a" * 64, longest), ("7", {}), ("rabi-7_a.b", {"angle": 30, "b": [None]})):
        submission = jobs.parse({"job": "X(0)", "mode": "echo", "tag": tag, "note": note})
        assert submission.tag == tag
        assert json.loads(submission.note) == note
    assert jobs.parse({"job": "X(0)", "mode": "echo"})[5:] == (None, None, None, 0)


def test_a_reason_stays_short_and_on_one_line_whatever_was_sent():
    long = "\n" * 100_000
    for value in ({"job": "X(0)", "mode": long},
                  {"job": "X(0)", "mode": "echo", long: 1},
                  {"job": "X(0)", "mode": "echo", "shots": 10 ** 4000},
                  {"job": long, "mode": "echo"}):
        with pytest.raises(Malformed) as refused:
            jobs.parse(value)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


def test_every_status_and_event_of_the_design_has_its_place_in_the_table_and_no_other_has():
    starting, retrying, success, runtime_error = "Starting", "Retrying", "Success", "Runtime Error"
    ends = {"retry": retrying, "succeeded": success, "failed": runtime_error}
    allowed = {
        starting: {"claimed": starting, **ends},
        retrying: {"claimed": retrying, **ends},
        success: {}, runtime_error: {}}
    assert jobs.STATUSES == (starting, retrying, success, runtime_error)
    for status, event in itertools.product(allowed, ("claimed", "retry", "succeeded", "failed")):
        assert jobs.TRANSITIONS.get((status, event)) == allowed[status].get(event), (status, event)
    assert len(jobs.TRANSITIONS) == sum(map(len, allowed.values()))
    assert set(jobs.OPEN) == {starting, retrying}


@pytest.mark.parametrize("outcome, attempt, event", [
    (Outcome(0), 1, "succeeded"), (Outcome(0), 5, "succeeded"),
    (Outcome(3), 1, "failed"), (Outcome(255), 5, "failed"),
    (Outcome(75, transient=True), 1, "retry"), (Outcome(75, transient=True), 4, "retry"),
    (Outcome(75, transient=True), 5, "failed"), (Outcome(75, transient=True), 6, "failed"),
    (Outcome(75), 1, "failed"),
    (Outcome(126, transient=True, started=False), 2, "retry")])
def test_only_a_transient_outcome_is_tried_again_and_only_until_the_last_attempt(
        outcome, attempt, event):
    assert jobs.decide(outcome, attempt, RetryPolicy()) == event


def test_decide_gives_nothing_but_events_that_the_table_knows_for_every_open_status():
    given = {jobs.decide(Outcome(code, transient=transient), attempt, RetryPolicy(attempts=2))
             for code in (0, 1) for transient in (False, True) for attempt in (1, 2, 3)}
    assert given == {"retry", "succeeded", "failed"}
    assert {(status, event) for status in jobs.OPEN for event in given} <= set(jobs.TRANSITIONS)


def test_the_delay_doubles_from_half_a_second_to_thirty_and_the_dice_take_up_to_half_of_it_off():
    policy = RetryPolicy()
    assert policy.attempts == 5
    assert [policy.delay(attempt, 1.0) for attempt in range(1, 9)] == [
        0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [policy.delay(attempt, 0.0) for attempt in range(1, 9)] == [
        0.25, 0.5, 1, 2, 4, 8, 15, 15]
    assert policy.delay(3, 0.5) == 1.5
    assert policy.delay(10 ** 6, 1.0) == 30, "no overflow, however often"


def test_a_job_has_the_ten_documented_members_in_the_documented_order():
    assert jobs.Job._fields == (
        "id", "job", "mode", "status", "runtime", "return_code", "runtime_error",
        "created_time", "start_time", "end_time")


def test_the_pattern_is_the_documented_one_with_ascii_digits():
    documented = r"^[XYZ]\(\d{1,3}\)(, [XYZ]\(\d{1,3}\))*$"
    ours = f"^{jobs.PATTERN.pattern}$".replace("(?:", "(").replace("[0-9]", r"\d")
    assert ours == documented, json.dumps(ours)
