"""ChatTemplate: what transformers renders, and a refusal for what never ends."""

import json
from datetime import datetime
from pathlib import Path

import pytest
import transformers
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import ChatMessage
from llmservices.texts.templates import ChatTemplate
from llmservices.tokenizer.vocabulary import load_vocabulary

NOW = datetime(2026, 1, 2, 3, 4, 5)
CHAT = [
    ChatMessage(role="system", content="Be <b>brief</b> & 'kind'.\n"),
    ChatMessage(role="user", content="  Hi, 日本 {{ 7 }} "),
    ChatMessage(role="assistant", content="Hello"),
    ChatMessage(role="user", content="Bye"),
]

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}
{%- set system = messages[0]['content'] | trim %}{% else %}{% set rest = messages %}{% endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate') }}
    {%- endif %}
    {%- if loop.index0 == 0 and system is defined %}
        {%- set content = '<<SYS>>' ~ system ~ '<</SYS>>' ~ message.content %}
    {%- else %}{% set content = message.content %}{% endif %}
    {%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else %}{% generation %}{{ ' ' + content + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}"""
MACROS = """{%- macro turn(message, depth=1) -%}
{{ message.role | upper }}: {{ message | tojson }}{{ '!' * depth }}
{%- endmacro -%}
{%- set ns = namespace(count=0, seen='') -%}
{%- for message in messages if message.role != 'system' -%}
{%- set ns.count = ns.count + 1 -%}
{%- set ns.seen = ns.seen ~ message.role[0] -%}
{%- if loop.last %}{% continue %}{% endif -%}
{{ turn(message, loop.index) }}{{ loop.length }}
{% endfor -%}
{{ ns.count }} {{ ns.seen }} {{ tools is none }} {{ documents }} {{ pad_token is defined }}
{{ messages | map(attribute='role') | join(', ') }} {{ dict(a=1) | tojson(indent=2) }}
{{ 'x'.replace('x', 'yy') }} {{ '{}-{:>4}'.format('a', 1) }} {{ ', '.join(['a', 'b']) }}
{{ '{{{}}} 2026 {:04d}'.format('a', 7) }} {{ '2026 %s 100%% {{' % 'a' }}
{{ '%s-%s' % ('a', 'b') }} {{ range(3) | list }}
{{ 'a\nb' | indent(2) }}
{{ strftime_now('') }}{{ messages[0].content | replace('<b>', '**') | length }}
{{ 'q' | center(5) }}|
"""
RECURSIVE = """{%- for item in [[1, [2]], [3]] recursive %}({% if item is iterable %}
{{- loop(item) }}{% else %}{{ item }}{% endif %}){% endfor %}"""
TEMPLATES = [CHATML, LLAMA_2, MACROS, RECURSIVE, "", "{{ messages | length }}"]


def folder_with(path: Path, tokenizer: str, **config: object) -> Path:
    (path / "tokenizer.json").write_text(tokenizer)
    named = {"bos_token": "<s>", "eos_token": "</s>", **config}
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named})
    )
    return path


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("source", TEMPLATES)
def test_renders_as_transformers_does(
    source: str, add_generation_prompt: bool, tmp_path: Path, byte_level_file: str
) -> None:
    folder = folder_with(tmp_path, byte_level_file)
    (folder / "chat_template.jinja").write_text(source)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": message.role, "content": message.content} for message in CHAT]
    vocabulary = load_vocabulary(folder)
    assert vocabulary.chat_template is not None
    text = vocabulary.chat_template.render(
        CHAT, now=NOW, add_generation_prompt=add_generation_prompt
    )
    assert text == theirs.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    if add_generation_prompt:
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert vocabulary.encode_rendered(text) == ids


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "plain"),
        ([{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}], "a"),
        ([{"name": "tool_use", "template": "b"}], None),
        (None, None),
    ],
)
def test_the_template_in_the_configuration(
    template: object, expected: str | None, tmp_path: Path, byte_level_file: str
) -> None:
    folder = folder_with(tmp_path, byte_level_file, chat_template=template)
    found = load_vocabulary(folder).chat_template
    assert (found.render(CHAT, now=NOW) if found else None) == expected


def test_the_time_is_the_callers() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {})
    assert template.render(CHAT, now=NOW) == "02 Jan 2026"


ENDLESS = [
    "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "{% for a in range(9000) %}{% for b in range(9000) if false %}{% endfor %}{% endfor %}",
    "{% for a in range(100001) %}{% endfor %}",
    "{% for a in range(90000) %}{{ messages[0].content }}{{ 'x' * 1000 }}{% endfor %}",
    "{{ 'x' * 10000000000 }}",
    "{{ [0] * 10000000000 }}",
    "{{ messages | length ** 99999 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ ('{0}' * 100000).format('x' * 100000) }}",
    "{{ ('%s' * 100) % (['x' * 100000] * 100) }}",
    "{{ '%(a)999999999d' % {'a': 1} }}",
    "{{ '%.*f' % (999999999, 1) }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ ('x' * 100000).join(range(90000) | list) }}",
    "{{ 'x'.translate({120: 'y' * 1000000}) }}",
    "{{ 'x'.ljust(9999999999) }}",
    "{{ 'x' | center(9999999999) }}",
    "{{ ('x' * 3000000).replace('x', 'x' * 3000000) }}",
    "{{ ('x' * 3000000) | replace('x', 'x' * 3000000) }}",
    "{{ range(90000) | join('x' * 90000) }}",
    "{{ {'a': 1} | tojson(indent=999999999) }}",
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set ns = namespace(t='xx') %}{% for i in range(99) %}{% set ns.t = ns.t ~ ns.t %}"
    "{% endfor %}",
    "{% set ns = namespace(t='xx') %}{% for i in range(99) %}{% set ns.t = ns.t + ns.t %}"
    "{% endfor %}",
    "{% set ns = namespace(t='xx') %}{% for i in range(99) %}{% set t %}{{ ns.t }}{{ ns.t }}"
    "{% endset %}{% set ns.t = t %}{% endfor %}",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_what_never_ends_is_stopped(source: str) -> None:
    with pytest.raises(RemoteError) as caught:
        ChatTemplate(source, {}).render(CHAT, now=NOW)
    assert caught.value.kind is ErrorKind.INVALID


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[0].content.nope() }}", "nope"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__x__ = 1 %}", "__x__"),
        ("{% include 'other' %}", "loader"),
        ("{{ nothing.at.all }}", "undefined"),
    ],
)
def test_a_failing_template_says_why(source: str, said: str) -> None:
    with pytest.raises(RemoteError, match=said) as caught:
        ChatTemplate(source, {}).render(CHAT, now=NOW)
    assert caught.value.kind is ErrorKind.INVALID


@pytest.mark.parametrize("source", ["{% for %}", "{{", "{% nonsense %}", "{% endfor %}"])
def test_a_template_that_does_not_compile(source: str) -> None:
    with pytest.raises(RemoteError, match="does not compile"):
        ChatTemplate(source, {})


def test_a_refusal_does_not_harm_the_next_rendering() -> None:
    template = ChatTemplate(
        "{% for a in range(messages | length * 40000) %}{% for b in range(30) %}"
        "{% endfor %}{% endfor %}ok",
        {},
    )
    with pytest.raises(RemoteError, match="steps"):
        template.render(CHAT[:1], now=NOW)
    assert template.render([], now=NOW) == "ok"
