"""A template and a tokenizer that read a prompt differently are refused; that they fit is tested with the templates."""

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.text import template_check


# D22: a template that does not fit the tokenizer
def test_template_that_does_not_fit(tiny, monkeypatch):
    template_check.check_template(tiny("chatml"), "chatml")
    monkeypatch.setattr(template_check, "chat_template", lambda *_: "{{ messages[0]['content'] }}")
    with pytest.raises(
        Refusal, match=r"\[C-TEMPLATE\] .*the tokenizer reads the chatml prompt in another way at token 0"
    ):
        template_check.check_template(tiny("chatml"), "chatml")
