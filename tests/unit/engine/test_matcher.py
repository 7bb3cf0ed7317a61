"""What may come next in a grammar, and when nothing can."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llmos.errors import InvalidConstraint, UnsupportedFeature
from tests.fakes import json_tokens
from tests.fakes.json_tokens import END, OTHER, SIZE, decode, encode
from worker.backend import Constraint
from worker.engine.grammar.matcher import Matcher
from worker.engine.grammar.vocabulary import Vocabulary

pytestmark = pytest.mark.torch

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "größe": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["name"],
    "additionalProperties": False,
}
NAMES = ("the", "then", 'a "quoted" name', "two\nlines", "日本", "\\d{2}|/")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return Vocabulary(json_tokens.write(tmp_path_factory.mktemp("model")), SIZE, {END})


Begin = Callable[..., Matcher]


@pytest.fixture
def begin(vocabulary: Vocabulary) -> Begin:
    def make(constraint: Constraint, text: str | list[int] = "", ignore_eos: bool = False) -> Matcher:
        matcher = Matcher(vocabulary.compile(constraint), vocabulary, ignore_eos=ignore_eos)
        matcher.advance(encode(text) if isinstance(text, str) else text)
        return matcher

    return make


def schema(value: object) -> Constraint:
    return Constraint("json_schema", json.dumps(value))


def regex(text: str) -> Constraint:
    return Constraint("regex", text)


def allowed(matcher: Matcher, barred: tuple[int, ...] = ()) -> set[int]:
    mask = matcher.allowed(barred)
    assert mask.shape == (SIZE,)
    return set(mask.nonzero().flatten().tolist())


def is_person(text: str) -> bool:
    value = json.loads(text)
    rest = {key: number for key, number in value.items() if key != "name"}
    return len(value["name"]) <= 5 and (rest == {} or (list(rest) == ["größe"] and rest["größe"] in range(10)))


WALKS: list[tuple[Constraint, Callable[[str], object]]] = [
    (schema(SCHEMA), is_person),
    (schema({"type": "array", "items": {"enum": [1, None, "a b"]}, "maxItems": 3}), json.loads),
    (schema({"oneOf": [{"type": "boolean"}, {"const": "the"}]}), lambda text: json.loads(text) in (True, False, "the")),
    (regex(r"[a-c]{2,4}( the)?"), re.compile(r"[a-c]{2,4}( the)?").fullmatch),
    (Constraint("choice", texts=NAMES), lambda text: text in NAMES),
]


@pytest.mark.parametrize(("constraint", "holds"), WALKS)
@pytest.mark.parametrize("seed", range(4))
def test_any_walk_ends_in_what_was_asked_for_and_can_be_taken_up_anywhere(
    constraint: Constraint, holds: Callable[[str], object], seed: int, begin: Begin
) -> None:
    source, matcher, tokens = random.Random(seed), begin(constraint), list[int]()
    masks = [allowed(matcher)]
    while not matcher.complete and tokens[-1:] != [END]:
        tokens.append(source.choice(sorted(masks[-1])))
        matcher.advance(tokens[-1:])
        masks.append(allowed(matcher))
    assert holds(decode(tokens)) and OTHER not in tokens
    for index, mask in enumerate(masks):
        assert allowed(begin(constraint, tokens[:index])) == mask


def test_a_closed_object_is_complete_without_an_end_token(begin: Begin) -> None:
    constraint = Constraint("json_object")
    assert not begin(constraint, '{"name": {}').complete
    assert begin(constraint, '{"name": {}}').complete
    assert allowed(begin(constraint)) <= {token for token in range(SIZE) if decode([token]).startswith("{")}


def test_an_end_token_may_come_only_where_the_text_could_end(begin: Begin) -> None:
    assert END not in allowed(begin(regex("a+b?")))
    assert END in allowed(begin(regex("a+b?"), "aa"))
    assert allowed(begin(regex("a+b?"), "aa", ignore_eos=True)) == {*encode("a"), *encode("aa"), *encode("b")}
    assert begin(regex("a+b?"), "aab", ignore_eos=True).complete
    assert begin(regex("a+b?"), [*encode("a"), END]).complete


def test_what_is_barred_is_left_out_unless_nothing_else_is_left(begin: Begin) -> None:
    matcher = begin(regex("a+b?"), "a")
    assert END not in allowed(matcher, (END, OTHER))
    assert allowed(begin(regex("[ab]")), tuple(encode("b"))) == set(encode("a"))
    assert allowed(begin(regex("b")), tuple(encode("b"))) == set(encode("b"))


@pytest.mark.parametrize(
    ("constraint", "why"),
    [
        (regex("(a"), "regex"),
        (regex("(?=a)b"), "look-around"),
        (regex(r"(a)\1"), "backreferences"),
        (regex(""), "empty"),
        (regex("a{0}"), "empty"),
        (schema({"not": {"type": "string"}}), "not"),
        (schema({"oneOf": [{"type": "string"}, {"maxLength": 2}]}), "oneOf"),
        (schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "Unsatisfiable"),
        (schema({"$ref": "http://localhost/other"}), "Resource"),
        (Constraint("json_schema", '{"type"'), "cannot be read"),
        (schema([1]), "cannot be read"),
        (Constraint("json_schema", '{"items":' * 5000 + '{"format": "date"}' + "}" * 5000), "nested"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_a_reason(constraint: Constraint, why: str, begin: Begin) -> None:
    with pytest.raises(InvalidConstraint, match=why) as caught:
        begin(constraint)
    assert caught.value.param == "constraint"
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("date", ("2024-02-29", "2000-02-29", "0001-12-31"), ("2023-02-29", "1900-02-29", "0000-01-01", "2023-04-31")),
        ("time", ("23:59:59Z", "00:00:00.5+23:59"), ("24:00:00Z", "10:00:60Z", "10:00:00", "10:00:00+24:00")),
        ("date-time", ("2024-02-29T00:00:00Z",), ("2023-02-29T00:00:00Z", "2024-01-01 00:00:00Z")),
    ],
)
def test_dates_and_times_are_real_ones(form: str, good: tuple[str, ...], bad: tuple[str, ...], begin: Begin) -> None:
    date = {"type": "string", "format": form}
    wanted = schema({"type": "object", "properties": {"format": {"anyOf": [{"type": "null"}, date]}}})
    for text in good:
        assert begin(wanted, f'{{"format": "{text}"}}').complete
    for text in bad:
        with pytest.raises(InvalidConstraint):
            begin(wanted, f'{{"format": "{text}"}}')


def test_tokens_that_do_not_fit_are_refused(begin: Begin) -> None:
    with pytest.raises(InvalidConstraint):
        begin(regex("ab"), "ac")
    with pytest.raises(InvalidConstraint):
        begin(regex("ab"), [OTHER])


def test_too_much_work_for_one_token_is_refused(begin: Begin) -> None:
    with pytest.raises(InvalidConstraint):
        begin(regex(r"(a?){500}a{500}b"), "a")


def test_a_model_without_end_tokens_ends_with_the_grammar(tmp_path: Path) -> None:
    vocabulary = Vocabulary(json_tokens.write(tmp_path), SIZE, ())
    matcher = Matcher(vocabulary.compile(regex("a+b")), vocabulary)
    matcher.advance(encode("aa"))
    assert allowed(matcher) == {*encode("a"), *encode("aa"), *encode("b")}
    matcher.advance(encode("b"))
    assert matcher.complete


def test_a_tokenizer_of_another_kind_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeature):
        Vocabulary(tmp_path, SIZE, ())
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}}}')
    with pytest.raises(UnsupportedFeature):
        Vocabulary(tmp_path, SIZE, ())
