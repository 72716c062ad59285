"""Text for a person: results whose shape is not known, and characters that are no text."""
import tracemalloc

import pytest

from oqc import messages, text


@pytest.mark.parametrize("result", [
    "[" * 100_000,
    '{"probabilities": [0, 1e999]}',
    '{"probabilities": [0, 1e12]}',
    '{"probabilities": [0, -1]}',
    f'{{"probabilities": [0, {"1" * 400}]}}',
    f'{{"probabilities": [0, 1], "bloch": [{"1" * 400}]}}',
    '{"probabilities": [0, 1], "counts": {"0": 1.5}}',
    '{"probabilities": {"1": 1}}'])
def test_a_result_that_only_resembles_one_of_a_simulation_is_shown_as_it_is(result):
    shown = text.result_text(result, "X(90)")
    numbers = shown.replace(result + "\n", "", 1)
    assert numbers in ("", "p1        1.000000\np1_ideal  0.500000\n") and shown != numbers


def test_half_of_a_surrogate_pair_in_a_result_is_shown_as_a_question_mark():
    shown = text.result_text('{"probabilities": [0, 1], "counts": {"\\ud800": 1}}', "X(0)")
    assert b"\ncount?           1\np1 " in messages.text_response(shown).body


def test_what_a_terminal_obeys_is_escaped_in_the_name_of_a_count():
    result = '{"probabilities": [0, 1], "counts": {"\\u001b[2J\\r\\n": 1}}'
    assert "\ncount\\x1b[2J\\x0d\\x0a         1\n" in text.result_text(result, "X(0)")


def test_the_table_of_jobs_says_that_its_times_are_utc_above_the_column_of_times():
    row = (1, "X(90)", "echo", "Success", "echo", 0, None, "2026-11-23T17:19:05.123456Z",
           "2026-11-23T17:19:05.130000Z", "2026-11-23T17:19:05.250000Z", "ann", "rabi-7")
    header, line = b"".join(text.job_rows([[row]])).decode().splitlines()
    place = header.index("CREATED (UTC)  ")
    assert line[place:place + 21] == "2026-11-23 17:19:05  "


def test_a_log_of_control_characters_takes_little_memory_to_show():
    """One of 8 MiB took 650 MiB."""
    tracemalloc.start()
    try:
        assert len(text.escaped("\0" * (1 << 16))) == 4 << 16
        assert tracemalloc.get_traced_memory()[1] < 20 << 16
    finally:
        tracemalloc.stop()
