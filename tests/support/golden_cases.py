"""The questions and answers of the golden file, generated from a seed; without VLMEvalKit and without the package."""

import base64
import random
import struct
import zlib

LETTERS = "ABCDEFGHIJ"
OPTIONS = (
    "red|green|blue|dark red|None|1|12|3.5|yes|no|a dog|the dog on the left|红色|蓝色|3/11|None of the above|A|7%"
).split("|")
WORDS = "The answer is a A B C D E F Z z option letter: I think so Because not no yes of in red blue 1 12".split()
SHAPES = (
    "{letter}", "{letter}.", "({letter})", "[{letter}]", "{letter}:", "{letter}. {text}", "{text}", "{text}.",
    " {letter}\n", "Answer: {letter}", "The answer is {letter}.", "The answer is **{letter}**",
    "Option {letter} is correct, I think so", "{letter} and {other}", "{letter}, because {text} is not {wrong}",
    "It is {text}, not {wrong}", "I choose {TEXT}", "{lower}", "{letter}{letter}", "{letter}-{text}", "#{letter}!",
    "答案是{letter}", "答案是 {letter} 。", "Z", "Z. none", "", "None", "nan",
    "Sorry, I can't help with images of people yet.", "I can't process this file. {letter}",
    "I'm sorry, but without the image provided", "Cannot determine the answer",
    "Failed to obtain answer via API. {letter}", "Failed to obtain answer via API. {text}",
    "{letter} is shown in the upper left corner of this large image", "A dog is on the {letter}",
    "In this large image of many things the one that is shown is {letter}", "\\boxed{{{letter}}}",
    "one two three four {letter} five six seven", "one two three {letter} four five six",
    "{text} {text} {text} {text} {text}",
)  # fmt: skip
SHORT = (
    "yes|no|Yes.|No!|yes, no|3|3.|3.0|three|none|zero|ten|a dog|the dog|dog|an apple|dont|don't|couldnt've|1,000|1000"
    '|1, 000|$5.99|5.|U.S.A.|u.s.a|coca-cola|coca cola|coca - cola|nike|"nike"|a/b|what?|what ?|?what|hello_world'
    "|stop!|(stop)|7:30|7.30 pm|e.g. this|...|-|_|@home|`x`|let's|she's|somebody'd|twas|o'clock|oclock|Im|im|99%|+|=|\\"
    "|new\nline|tab\tin|  spaces  |İstanbul|straße|数字|½|.5|0.5|a. b|1.a|a.1|the|a an the|one|One Two"
    "|y'all'd've|ow'sat"
).split("|")
YES_NO = (
    "Yes|No|Yes, it is.|no, it's not|yes/no|yes-no|Yes it is, no doubt|nope|YES!!|Not sure||None|y.e.s|(yes)|yes)no|NO."
    "|1.yes|yes.1"
).split("|")
NUMBERS = {"integer": ("3", "0", "-7", "1000", "3.0"), "float": ("1.5", "0.0", "3.14", "2"), "list": ("[1, 2]",)}
SUBTASKS = (
    "OCR artwork celebrity color count existence landmark position posters scene code_reasoning commonsense_reasoning"
    " numerical_calculation text_translation"
).split()
ABILITIES = (
    "attribute_reasoning", "coarse_perception", "finegrained_perception (cross-instance)",
    "finegrained_perception (instance-level)", "logic_reasoning", "relation_reasoning",
)  # fmt: skip
Row = dict[str, str]
File = tuple[str, dict[str, str]]  # a TSV, and the predictions by index


def option_cases(random_: random.Random, count: int) -> list[tuple[Row, str]]:
    """(options, answer): sentences of every shape, words at random, and three answers of 32,000 characters and more."""
    cases = []
    for number in range(count):
        options = dict(zip(LETTERS, random_.sample(OPTIONS, random_.choice((2, 3, 4, 4, 4, 5, 8))), strict=False))
        letter, other = random_.sample(list(options), 2)
        answer = " ".join(random_.choices(WORDS, k=random_.randrange(1, 12)))
        if number % 3 != 2:
            texts = {"text": options[letter], "TEXT": options[letter].upper(), "wrong": options[other]}
            answer = SHAPES[number % len(SHAPES)].format(letter=letter, other=other, lower=letter.lower(), **texts)
        cases.append((options, answer))
    animals = {"A": "cat", "B": "dog"}
    return [*cases, (animals, "word " * 8000 + "B"), (animals, "dog " * 10000), (animals, "B " + "word " * 8000)]


def short_answers(random_: random.Random, count: int) -> list[tuple[list[str], str]]:
    """(answers of people, prediction)."""
    cases = []
    for number in range(count):
        likely, own = random_.sample(SHORT, random_.choice((1, 2, 3, 5))), SHORT[number % len(SHORT)]
        truths = random_.choices(likely, k=random_.choice((10, 10, 10, 7, 4)))
        if number % 4 == 0:
            truths[: random_.randrange(1, 4)] = [own] * random_.randrange(1, 6)
        cases.append((truths, own if number % 2 else random_.choice(likely)))
    for stop in ("3.", "1.a", "a.1", "5 .", ".", "3..", "Yes."):  # where the rules of 2024 read otherwise
        without = stop.replace(".", "")
        cases += [([without] * 8 + [stop] * 2, stop), ([without] * 2 + [stop] * 8, without), ([stop] * 10, without)]
    return cases


def yes_no_answers(random_: random.Random, count: int) -> list[str]:
    """Predictions for questions of MME."""
    fixed = [*SHORT, *YES_NO, "yes." * 40, "No. " * 10000]
    return fixed + [" ".join(random_.choices([*WORDS, "Yes,", "No.", "yes."], k=6)) for _ in range(count - len(fixed))]


def mathvista_cases(random_: random.Random, count: int) -> list[tuple[Row, str]]:
    """(row, prediction), for every kind of answer that MathVista has."""
    cases = []
    for number in range(count):
        kind = ("choice", "integer", "float", "list", "choice", "integer")[number % 6]
        if kind == "choice":
            texts = random_.sample(OPTIONS, random_.choice((2, 3, 4, 5)))
            option = random_.choice(LETTERS[: len(texts)])
            row = {"question_type": "multi_choice", "answer_type": "text", "choices": repr(texts)}
            row |= {"answer": texts[LETTERS.index(option)], "answer_option": option}
            sentence = random_.choice(option_cases(random_, 45)[:-3])[1]
            shapes = (sentence, option, option, f"({option})", row["answer"], LETTERS[len(texts)])
        else:
            right = random_.choice(NUMBERS[kind])
            row = {"question_type": "free_form", "answer_type": kind, "choices": "", "answer_option": ""}
            row["answer"] = right
            wrong = random_.choice(("3", "3.0", "3.", "0", "", "None", "three", "1_000", "1,000", "[1, 2]", "inf"))
            shapes = (right, right, f" {right}\n", f"{right}.", f"+{right}", f"It is {right}", wrong)
        cases.append((row, random_.choice(shapes)))
    return cases


def image(number: int) -> str:
    """A PNG of 2 × 2 pixels of one colour, as base64 of more than 64 characters."""
    colour = bytes((number * 37 % 256, number * 91 % 256, number * 17 % 256))
    pixels = zlib.compress((b"\0" + colour * 2) * 2)
    file = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b"")):
        file += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return base64.b64encode(file).decode()


def tsv(columns: list[str], rows: list[Row]) -> str:
    """A file as VLMEvalKit publishes them; fields with tabs, newlines or quotes are quoted."""

    def field(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if set(text) & set('\t\n"') else text

    header = {name: name for name in columns}
    return "".join("\t".join(field(row.get(name, "")) for name in columns) + "\n" for row in (header, *rows))


def tiny_files(random_: random.Random) -> dict[str, File]:
    """Dataset → its TSV and predictions, for every kind of benchmark."""
    makers = {
        "MMBench_TEST_EN": _circular, "MMBench_TEST_CN": _circular, "SEEDBench_IMG": _multiple_choice,
        "ScienceQA_TEST": _multiple_choice, "MME": _mme, "TextVQA_VAL": _textvqa, "MathVista_MINI": _mathvista,
        "MMVet": _mmvet,
    }  # fmt: skip
    return {name: maker(random_, name) for name, maker in makers.items()}


def _choice_row(random_: random.Random, name: str, number: int) -> Row:
    shown = [text for text in OPTIONS if text != "None"]  # which pandas takes for missing
    texts = random_.sample(shown, random_.choice((2, 3, 4, 5 if name == "ScienceQA_TEST" else 4)))
    row = dict(zip(LETTERS, texts, strict=False))
    row |= {"index": str(number), "question": f'Which "colour"\nis it, {number}?', "answer": random_.choice(list(row))}
    if number % 3 == 0:
        row["hint"] = "Look\tat the <image>." if number % 2 else "看图。"
    return row


def _prediction(random_: random.Random, row: Row, right: float) -> str:
    options = {letter: row[letter] for letter in LETTERS if letter in row}
    if random_.random() < right:
        return random_.choice((row["answer"], f"{row['answer']}.", f"{row['answer']}. {row[row['answer']]}"))
    letter = random_.choice(list(options))
    shapes = (letter, "I do not know", options[letter], "A or B", f"{letter} is what is shown in the image there")
    return random_.choice(shapes)


def _multiple_choice(random_: random.Random, name: str) -> File:
    rows = [_choice_row(random_, name, number) for number in range(60)]
    for number, row in enumerate(rows):
        row |= {"image": image(number), "category": f"category {number % 4}", "l2-category": f"subject {number % 2}"}
    columns = ["index", "image", "question", "hint", *"ABCDE", "answer", "category", "l2-category"]
    if name == "SEEDBench_IMG":
        columns = ["index", "image", "question", *"ABCD", "answer", "category"]
    return tsv(columns, rows), {row["index"]: _prediction(random_, row, 0.6) for row in rows}


def _circular(random_: random.Random, name: str) -> File:
    rows, predictions = [], {}
    for number in range(40):
        first = _choice_row(random_, name, number)
        letters, right = [letter for letter in LETTERS if letter in first], random_.choice((0.5, 1.0, 1.0))
        for turn in range(len(letters)):
            row = first | {"index": str(number + turn * 1_000_000), "category": f"skill {number % 9}"}
            row |= {"l2-category": ABILITIES[number % 6], "split": "dev" if number % 4 == 0 else "test"}
            row["image"] = str(number) if turn else image(number)
            for place, letter in enumerate(letters):
                row[letter] = first[letters[(place + turn) % len(letters)]]
            row["answer"] = letters[(letters.index(first["answer"]) - turn) % len(letters)]
            rows.append(row)
            predictions[row["index"]] = _prediction(random_, row, right)
    rows.sort(key=lambda row: random_.random() if row["image"].isdigit() else -1)
    columns = ["index", "question", "hint", *"ABCD", "answer", "category", "l2-category", "split", "image"]
    return tsv(columns, rows), predictions


def _mme(random_: random.Random, name: str) -> File:
    rows, predictions = [], {}
    for number in range(14 * 5):
        task = SUBTASKS[number % 14]
        for answer, wrong in (("Yes", "No"), ("No", "Yes")):
            index = str(len(rows))
            row = {"index": index, "image": image(number), "image_path": f"{task}/{number // 14}.png", "category": task}
            rows.append(row | {"question": "Is it red? Please answer yes or no.", "answer": answer})
            shapes = (answer, answer, f"{answer}.", f"{answer}, it is", wrong, "Not sure", "yes or no")
            predictions[index] = random_.choice(shapes)
    return tsv(["index", "image", "question", "answer", "category", "image_path"], rows), predictions


def _textvqa(random_: random.Random, name: str) -> File:
    rows, predictions = [], {}
    for number, (truths, prediction) in enumerate(short_answers(random_, 80)):
        index = str(34602 + number)
        rows.append({"index": index, "image": image(number), "question": "what is written?", "answer": repr(truths)})
        predictions[index] = prediction
    return tsv(["index", "image", "question", "answer"], rows), predictions


def _mathvista(random_: random.Random, name: str) -> File:
    skills = (["algebraic reasoning"], ["logical reasoning", "statistical reasoning"])
    rows, predictions = [], {}
    for number, (row, prediction) in enumerate(mathvista_cases(random_, 60)):
        row |= {"index": str(number + 1), "image": image(number), "question": "Hint: …\nQuestion: how many?"}
        rows.append(row | {"task": f"task {number % 5}", "skills": repr(skills[number % 2])})
        predictions[row["index"]] = prediction
    columns = "index image question answer question_type answer_type choices answer_option task skills".split()
    return tsv(columns, rows), predictions


def _mmvet(random_: random.Random, name: str) -> File:
    """For MM-Vet the predictions are the judge's replies."""
    categories, replies = ("rec", "ocr,math", "ocr,spat,math", "rec,know,gen", "ocr"), "0.0|0.5|1.0|1|0.7|2|-1|good|"
    rows, predictions = [], {}
    for number in range(20):
        row = {"index": f"v1_{number}", "image": image(number), "category": categories[number % 5]}
        rows.append(row | {"question": "What is x?", "answer": "-1<AND>-5"})
        predictions[row["index"]] = random_.choice(replies.split("|"))
    return tsv(["index", "image", "question", "answer", "category"], rows), predictions


def judge_cases(random_: random.Random) -> dict[str, list[tuple[Row, str, list[str]]]]:
    """(row, answer, what a judge replies to one try after another; "" is nothing), for MathVista and for MM-Vet.

    The first rows are a multiple-choice question, one for an integer and one for a list, each for the judge to read.
    """
    hint = "Hint: Please answer the question {}, at the end.\nQuestion: {}"
    last = {"question_type": "free_form", "choices": "", "answer_option": "", "task": "task 0", "skills": "['x']"}
    fixed = [
        last | {"question": hint.format("and provide the correct option letter, e.g., A, B, C, D", "Which is \\alpha?\n"
                                        "Choices:\n(A) 3/11\n(B) 8/11\n(C) 25°"), "answer_type": "text",
                "question_type": "multi_choice", "choices": "['3/11', '8/11', '25°']", "answer": "8/11",
                "answer_option": "B"},
        last | {"question": hint.format("requiring an integer answer and provide the final value, e.g., 1, 2, 3",
                                        "How many?"), "answer_type": "integer", "answer": "14"},
        last | {"question": hint.format("requiring a Python list as an answer and provide the final list, e.g., [1, 2]",
                                        "Which years?"), "answer_type": "list", "answer": "[2007, 2008]"},
    ]  # fmt: skip
    answers = ("It is the middle one.", 'There are "14" of them.\n', "Between 2007 and 2008")
    maths = [(row, answer, [row["answer"]]) for row, answer in zip(fixed, answers, strict=True)]
    for number, (row, answer) in enumerate(mathvista_cases(random_, 60)):
        row |= {"question": f"{hint.format('…', 'How many?')} {number}", "task": f"task {number % 5}"}
        replies = (row["answer"], row["answer_option"] or row["answer"], f"({row['answer_option']})", "B", "no idea")
        row["skills"] = repr(["x"] if number % 2 else ["x", "y"])
        maths.append((row, answer, ["", "", ""][: random_.choice((0, 0, 1, 3))] + [random_.choice(replies)]))
    grades, others = "0.0|0.5|1.0|1|0.7|0|.3|1e-1".split("|"), "|2|-1|good|0.5/1|1,0|nine|1.1".split("|")
    vets = []
    for number in range(30):
        truth = ("-1<AND>-5", "yes<OR>yeah", "a | b", "No <AND> no<OR>nope", "14")[number % 5]
        row = {
            "question": f"What is x, {number}?",
            "answer": truth,
            "category": ("rec,know,gen", "ocr,spat,math", "ocr")[number % 3],
        }
        replies = random_.choices(others, k=random_.choice((0, 0, 1, 4))) + [random_.choice(grades)]
        vets.append((row, f"x = {number}, or\n{truth}", ["good", *others[1:4], "nine"] if number % 7 == 6 else replies))
    cases = {"mathvista": maths, "mmvet": vets}
    for kind in cases.values():
        for number, (row, _, _) in enumerate(kind):
            row["index"] = str(number)
    return cases


def packed(text: str) -> str | dict[str, str]:
    """A long text in few characters, for JSON."""
    return text if len(text) < 1000 else {"zlib": base64.b64encode(zlib.compress(text.encode())).decode()}


def unpacked(value: str | dict[str, str]) -> str:
    return value if isinstance(value, str) else zlib.decompress(base64.b64decode(value["zlib"])).decode()
