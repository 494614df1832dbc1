"""Chat templates that would not end or fill the memory are stopped; what published ones do is not."""

import resource

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.text.bounded import huge_number
from llava_moslora.text.tokenizer import load_tokenizer
from llava_moslora.text.tokenizer_template import derive_template

HARMLESS = [
    "{{ '**Today** is 2 * 100000' }}",
    "{{ '  ' * loop.index0 ~ 4 * '-' }}",
    "a ** b, 123456789 {# 9 ** 9 ** 9 #}{% raw %}{{ 9 ** 9 }}{% endraw %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
    "{{ 'cut off",
]
HUGE = {
    "{{ '%}' ~ 10 ** 10 ** 9 }}": "** in line 1",
    "{{ 1 }}\n{% set x = x * x %}": "* in line 2",
    "{{ x * 2 * x }}": "* in line 1",
    "{{ 'a' * 99999999 }}": "99999999",
    "{{ 'a' * ('123456789' | int) }}": "12345678",
    "{{ 'a' | center(1000000000) }}": "10000000",
    "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}": "brackets nested too deeply",
}


@pytest.mark.parametrize("template", HARMLESS)
def test_harmless(template):
    assert huge_number(template) is None


@pytest.mark.parametrize("template", HUGE, ids=range(len(HUGE)))
def test_huge(template):
    assert huge_number(template) == HUGE[template]


LOOP = "{%% set n = namespace(s='a') %%}{%% for a in range(%d) %%}{%% set n.s = %s %%}{%% endfor %%}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOP % (60, "n.s ~ n.s"), "MemoryError"),
        (
            LOOP % (25, "n.s ~ n.s") + LOOP.replace("namespace(s='a')", "n") % (99999, "n.s ~ 'a'"),
            "stopped after 3 sec",
        ),
    ],
)
def test_a_text_that_grows_is_stopped(tiny_folder, template, said):
    tokenizer = load_tokenizer(tiny_folder("chatml"))
    tokenizer.chat_template = template
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(Refusal, match=rf"the chat template cannot render a conversation; found .*{said}"):
        derive_template(tokenizer)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
