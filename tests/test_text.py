"""Text for a person: results whose shape is not known, and characters that are no text."""
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
    assert text.result_text(result) == result + "\n"


def test_half_of_a_surrogate_pair_in_a_result_is_shown_as_a_question_mark():
    shown = text.result_text('{"probabilities": [0, 1], "counts": {"\\ud800": 1}}')
    assert messages.text_response(shown).body.endswith(b"\ncount?         1\n")
