"""Chat templates render as the model expects and refuse with a sentence."""

from __future__ import annotations

from datetime import datetime

import pytest

from gateway.text.template import EchoTemplate, JinjaTemplate
from gateway.types import Turn
from llmos.errors import InvalidRequest, UnsupportedFeature

CHATML = """{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
HELLO = (Turn("user", "Hello"),)


def test_chatml() -> None:
    assert JinjaTemplate(CHATML).render(HELLO) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tokens_names_and_dates_reach_the_template() -> None:
    template = JinjaTemplate(
        "{{ bos_token }}{{ messages[0].name }} {{ strftime_now('%Y-%m-%d') }} {{ messages | tojson }}{{ eos_token }}",
        bos_token="<s>",
        eos_token="</s>",
        now=lambda: datetime(2024, 5, 6),
    )
    rendered = template.render((Turn("user", "<é>", name="Ann"),))
    assert rendered == '<s>Ann 2024-05-06 [{"role": "user", "content": "<é>", "name": "Ann"}]</s>'


def test_break_and_continue_are_known() -> None:
    skip = "{% if m.role == 'system' %}{% continue %}{% endif %}"
    source = "{% for m in messages %}" + skip + "{{ m.content }}{% break %}{% endfor %}"
    assert JinjaTemplate(source).render((Turn("system", "s"), Turn("user", "u"), Turn("user", "v"))) == "u"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}none", "none"),
        ("{% for m in messages %}{% generation %}{{ m.content }}!{% endgeneration %}{% endfor %}", "Hello!"),
        (
            "{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
            '{"a":1,"b":"\\u00e9"}',
        ),
    ],
)
def test_what_transformers_offers_to_templates_is_here(source: str, text: str) -> None:
    assert JinjaTemplate(source).render(HELLO) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('Roles must alternate.') }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_template_that_fails_is_the_clients_error(source: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        JinjaTemplate(source).render(HELLO)
    assert refused.value.param == "messages"


def test_the_reason_that_a_template_gives_reaches_the_client() -> None:
    with pytest.raises(InvalidRequest, match="Roles must alternate"):
        JinjaTemplate("{{ raise_exception('Roles must alternate.') }}").render(HELLO)


def test_a_broken_template_is_refused_when_loaded() -> None:
    with pytest.raises(UnsupportedFeature):
        JinjaTemplate("{% for %}")


def test_echo_conversations_are_lines() -> None:
    assert EchoTemplate().render((Turn("system", "s"), Turn("user", "u"))) == "system: s\nuser: u\nassistant: "


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for x in messages %}" * 25 + "{% endfor %}" * 25,
    ],
    ids=["deep", "nested"],
)
def test_a_template_that_cannot_be_compiled_is_the_models_fault(source: str) -> None:
    with pytest.raises(UnsupportedFeature):
        JinjaTemplate(source)


def test_a_template_that_never_comes_back_up_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        JinjaTemplate("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").render(HELLO)
