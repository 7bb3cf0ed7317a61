"""A lease is never relied on for longer than the server can honour it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.etcd.lease import Validity


def test_deadline_counts_from_sending_not_from_the_answer() -> None:
    validity = Validity(sent_at=100.0, ttl_s=5.0)
    assert validity.deadline == 105.0
    validity.renewed(sent_at=102.0, ttl_s=5.0, now=104.5)
    assert validity.deadline == 107.0
    assert not validity.is_lost(106.9)
    assert validity.is_lost(107.0)


def test_ttl_of_zero_means_revoked() -> None:
    validity = Validity(100.0, 5.0)
    validity.renewed(sent_at=101.0, ttl_s=0, now=101.0)
    assert validity.is_lost(101.0)
    validity.renewed(sent_at=101.5, ttl_s=5.0, now=101.5)
    assert validity.is_lost(101.5), "a lie about a revoked lease revived it"


def test_answer_after_the_deadline_revives_nothing() -> None:
    validity = Validity(100.0, 5.0)
    validity.renewed(sent_at=104.0, ttl_s=5.0, now=105.0)
    assert validity.is_lost(105.0)


def test_answers_out_of_order_do_not_shorten() -> None:
    validity = Validity(100.0, 5.0)
    validity.renewed(sent_at=103.0, ttl_s=5.0, now=103.1)
    validity.renewed(sent_at=101.0, ttl_s=5.0, now=103.2)
    assert validity.deadline == 108.0


def test_given_up_stays_given_up() -> None:
    validity = Validity(100.0, 5.0)
    validity.give_up()
    validity.renewed(101.0, 5.0, 101.0)
    assert validity.is_lost(101.0)


def test_grant_without_a_ttl_is_lost_at_once() -> None:
    assert Validity(100.0, 0).is_lost(100.0)


@given(
    st.lists(
        st.tuples(
            st.floats(0.0, 3.0),  # wait before sending
            st.floats(0.0, 3.0),  # way to the server
            st.floats(0.0, 3.0),  # way back
            st.booleans(),  # the answer arrives
        ),
        max_size=20,
    )
)
def test_holder_never_outlives_a_truthful_server(renewals: list[tuple[float, float, float, bool]]) -> None:
    """Whatever the delays, while the holder relies on the lease the server has not given it away."""
    ttl_s, now = 2.0, 0.0
    validity, server_end = Validity(now, ttl_s), now + ttl_s
    for wait_s, there_s, back_s, arrives in renewals:
        sent_at = now + wait_s
        handled_at = sent_at + there_s
        expired = handled_at >= server_end
        if not expired:
            server_end = handled_at + ttl_s
        now = handled_at + back_s
        if arrives:
            validity.renewed(sent_at, 0 if expired else ttl_s, now)
        assert validity.is_lost(now) or now < server_end
