"""When a member of a fleet is started again, and when no more."""

from __future__ import annotations

from llmos.fleet.restarts import RestartHistory, RestartPolicy
from llmos.lifetime import EXIT_BROKE, EXIT_ENDED, EXIT_RESTART

POLICY = RestartPolicy(first_pause_s=0.5, longest_pause_s=3.0, steady_s=60.0, limit=5, window_s=180.0)


def test_pauses_double_up_to_the_longest_and_then_it_is_given_up() -> None:
    history = RestartHistory(POLICY)
    assert [history.ended(10.0 * n, 1.0, EXIT_BROKE) for n in range(6)] == [0.5, 1.0, 2.0, 3.0, 3.0, None]


def test_a_steady_life_begins_anew_and_old_ends_are_forgotten() -> None:
    history = RestartHistory(POLICY)
    for n in range(30):
        assert history.ended(100.0 * n, 99.0, EXIT_BROKE) == 0.5


def test_draining_itself_costs_no_pause_and_does_not_count() -> None:
    history = RestartHistory(POLICY)
    assert [history.ended(60.0 * n, 60.0, EXIT_RESTART) for n in range(20)] == [0.0] * 20
    assert history.ended(2000.0, 1.0, EXIT_BROKE) == 0.5


def test_draining_itself_again_and_again_counts() -> None:
    history = RestartHistory(POLICY)
    assert [history.ended(2.0 * n, 2.0, EXIT_RESTART) for n in range(6)][-1] is None


def test_an_end_that_nobody_ordered_counts_even_if_it_was_orderly() -> None:
    history = RestartHistory(POLICY)
    assert history.ended(0.0, 1.0, EXIT_ENDED) == 0.5


def test_a_person_may_have_it_tried_again() -> None:
    history = RestartHistory(POLICY)
    while history.ended(0.0, 1.0, EXIT_BROKE) is not None:
        pass
    history.forgive()
    assert history.ended(0.0, 1.0, EXIT_BROKE) == 0.5


def test_a_member_that_ends_for_ever_never_ends_its_keeper() -> None:
    history = RestartHistory(RestartPolicy())
    for n in range(2000):
        assert history.ended(55.0 * n, 40.0, EXIT_BROKE) is not None
