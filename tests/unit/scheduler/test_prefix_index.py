"""Who has which prefix cached, as far as workers have said and attempts let expect."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from llmos.internal.v1 import work_pb2
from scheduler.prefix_index import PrefixIndex

CHAIN = [11, 12, 13, 14, 15, 16]


def change(
    number: int, stored: Sequence[int] = (), removed: Sequence[int] = (), model: str = "m"
) -> work_pb2.CacheChange:
    return work_pb2.CacheChange(model=model, number=number, stored=stored, removed=removed)


def holders(index: PrefixIndex, hashes: Sequence[int]) -> dict[str, int]:
    """Length of the match by worker."""
    found: dict[str, int] = {}
    for length, bits in index.match(hashes):
        for worker in index.workers(bits, 99, 0):
            found.setdefault(worker, length)
    return found


def test_the_longest_match_comes_first() -> None:
    index = PrefixIndex()
    assert index.apply("a", change(1, CHAIN[:2]))
    assert index.apply("b", change(1, CHAIN[:5]))
    assert index.apply("c", change(1, [99]))
    assert [length for length, _ in index.match(CHAIN)] == [5, 2]
    assert holders(index, CHAIN) == {"a": 2, "b": 5}
    assert index.match([98]) == () and index.match([]) == ()
    assert index.apply("b", change(2, [], CHAIN[1:5]))
    assert holders(index, CHAIN) == {"a": 2, "b": 1}


def test_a_gap_empties_the_model_until_all_is_named_again() -> None:
    index = PrefixIndex()
    index.apply("a", change(1, CHAIN[:3]))
    index.apply("a", change(1, [77], model="other"))
    assert not index.apply("a", change(3, CHAIN[3:4]))
    assert holders(index, CHAIN) == {} and holders(index, [77]) == {"a": 1}
    assert index.apply("a", change(4, CHAIN[:6])), "asked already: what comes until then says nothing"
    assert holders(index, CHAIN) == {}
    assert index.apply("a", change(1, CHAIN[:4]))
    assert index.apply("a", change(2, CHAIN[4:5]))
    assert holders(index, CHAIN) == {"a": 5}


def test_what_ends_with_its_stream_leaves_nothing_behind() -> None:
    index = PrefixIndex()
    index.apply("a", change(1, CHAIN))
    index.apply("b", change(1, CHAIN[:1]))
    index.clear("a")
    assert holders(index, CHAIN) == {"b": 1} and len(index) == 1
    index.apply("a", change(1, CHAIN[:2]))
    index.forget("a")
    index.apply("late", change(1, [5]))
    assert holders(index, CHAIN) == {"b": 1} and holders(index, [5]) == {"late": 1}
    index.forget("b")
    index.forget("late")
    assert len(index) == 0


def test_what_attempts_will_cache_counts_until_the_worker_has_its_say() -> None:
    index = PrefixIndex()
    index.apply("a", change(1, CHAIN[:2]))
    expected = index.expect("a", CHAIN, 2)
    assert list(expected) == CHAIN[2:] and holders(index, CHAIN) == {"a": 6}
    index.apply("a", change(2, CHAIN[2:4]))
    index.settle("a", "m", expected)
    assert holders(index, CHAIN) == {"a": 4}


def test_there_is_a_limit() -> None:
    index = PrefixIndex(limit=3)
    index.apply("a", change(1, CHAIN))
    index.apply("b", change(1, CHAIN[:2]))
    assert len(index) == 3 and holders(index, CHAIN) == {"a": 3, "b": 2}
    index.forget("a")
    index.forget("b")
    assert len(index) == 0


def test_many_holders_are_named_in_turn() -> None:
    index = PrefixIndex()
    for number in range(100):
        index.apply(f"w{number}", change(1, CHAIN[:1]))
    [(_, bits)] = index.match(CHAIN)
    assert {index.workers(bits, 1, start)[0] for start in range(100)} == {f"w{number}" for number in range(100)}
    assert len(set(index.workers(bits, 7, 98))) == 7


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40), st.integers(0, 4)), max_size=40), st.integers(1, 40))
def test_matches_are_those_of_a_walk(moves: list[tuple[int, int, int]], asked: int) -> None:
    """Workers hold random lengths of one chain and of chains that branch off it."""
    index, lengths, numbers = PrefixIndex(), {}, dict.fromkeys(range(5), 0)
    chains = [[*range(1000, 1010), *range(2000 + 100 * branch, 2030 + 100 * branch)] for branch in range(5)]
    for worker, length, branch in moves:
        numbers[worker] += 1
        before = lengths.get(worker, [])
        lengths[worker] = chains[branch][:length]
        gone = [key for key in before if key not in lengths[worker]]
        index.apply(f"w{worker}", change(numbers[worker], lengths[worker], gone))
    prompt = chains[0][:asked]
    expected = {f"w{worker}": sum(key in held for key in prompt) for worker, held in lengths.items()}
    found = holders(index, prompt)
    assert found == {worker: length for worker, length in expected.items() if length}
