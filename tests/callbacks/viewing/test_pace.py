from callbacks.viewing.server import COARSE_BUDGET_S, Pace


def test_the_first_picture_is_as_fine_as_time_allows():
    pace = Pace()
    assert pace.scale(10_000, True) == 0.25  # nothing is known yet
    pace.note(10_000, True, 0.9 * COARSE_BUDGET_S)
    assert pace.scale(10_000, True) == 1.0
    assert pace.scale(40_000, True) == 0.5
    assert pace.scale(10_000_000, True) == 0.125  # never coarser


def test_colours_and_language_have_a_pace_each():
    pace = Pace()
    pace.note(10_000, False, 0.01 * COARSE_BUDGET_S)
    assert pace.scale(10_000, False) == 1.0
    assert pace.scale(10_000, True) == 0.25
