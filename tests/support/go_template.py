"""Renders the few actions of Go's text/template that a Modelfile of this package has; Go itself runs in a slow test."""

import json
import re

_ACTION = re.compile(r'\{\{ ((?:"(?:[^"\\]|\\.)*"|[^"}])*) \}\}')


def render(template: str, data: dict) -> str:
    """``template`` over ``data``: strings, fields, variables and their assignment, ``if``, ``range`` and ``eq``."""
    assert _ACTION.sub("", template) == "", "text between actions"
    actions = [match.group(1) for match in _ACTION.finditer(template)]
    nodes = _parse(actions)
    assert not actions, f"after the end: {actions}"
    out: list[str] = []
    _run(nodes, data, {}, out)
    return "".join(out)


def _parse(actions: list[str]) -> list[tuple[str, list, list]]:
    """Nodes up to an ``else`` or ``end`` that is not theirs; what was read is taken from ``actions``."""
    nodes = []
    while actions and actions[0].split(" ")[0] not in ("else", "end"):
        action = actions.pop(0)
        nodes.append(_branch(action, actions) if action.startswith(("if ", "range ")) else (action, [], []))
    return nodes


def _branch(action: str, actions: list[str]) -> tuple[str, list, list]:
    body, word = _parse(actions), actions.pop(0)
    if word == "end":
        return action, body, []
    if word == "else":
        otherwise = _parse(actions)
        assert actions.pop(0) == "end"
        return action, body, otherwise
    return action, body, [_branch(word.removeprefix("else "), actions)]  # `else if`, which shares the `end`


def _run(nodes: list, dot: object, variables: dict, out: list[str]) -> None:
    for action, body, otherwise in nodes:
        word, _, rest = action.partition(" ")
        if word == "range":
            for one in _value(rest, dot, variables):
                _run(body, one, variables, out)
        elif word == "if":
            _run(body if _value(rest, dot, variables) else otherwise, dot, variables, out)
        elif rest.startswith((":= ", "= ")):
            assert rest.startswith(":= ") != (word in variables), f"{word} is declared once, and before it is assigned"
            variables[word] = _value(rest.partition("= ")[2], dot, variables)
        else:
            out.append(_value(action, dot, variables))


def _value(expression: str, dot: object, variables: dict) -> object:
    if expression.startswith("eq "):
        one, other = expression.removeprefix("eq ").split(" ")
        return _value(one, dot, variables) == _value(other, dot, variables)
    if expression in ("true", "false"):
        return expression == "true"
    if expression.startswith('"'):
        return json.loads(expression)
    return variables[expression] if expression.startswith("$") else dot[expression.removeprefix(".")]
