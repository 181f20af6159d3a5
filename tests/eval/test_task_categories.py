"""Task categories: each rule on a task that meets it and one that just does not; the demo's problems."""

import gzip
import json
import os

import pytest

from dylora_moe.demo.problems import load_problems
from dylora_moe.eval.analysis.task_categories import CATEGORIES, OTHER, categories_of
from dylora_moe.hub_export.errors import InputError


def task(body, signature="def f(a, b):", example="", before=""):
    """A task in HumanEval's form: the prompt ends with the docstring."""
    lines = "".join(f"    {line}\n" for line in body.split("\n"))
    prompt = f'{before}{signature}\n    """Sort the strings of a dictionary. {example}"""\n'
    return {"task_id": "T/0", "prompt": prompt, "canonical_solution": lines, "entry_point": "f"}


# category, and a task that has it and nothing else
ALONE = [
    ("strings", task("return a.upper() + b")),
    ("strings", task("return f'{a}{b}'")),
    ("strings", task("return str(a)")),
    ("strings", task("return a == b", "def f(a: str, b):")),
    ("strings", task("return a", "def f(a, b) -> str:")),
    ("strings", task("return a + b", example=">>> f('a (b', 'c)')")),
    ("strings", task("return a + b", before="import string\n\n\n")),
    ("numbers", task("return a + b", "def f(a: int, b):")),
    ("numbers", task("return a + 1")),
    ("numbers", task("return b > 1.5")),
    ("numbers", task("return sum(range(b))")),
    ("numbers", task("return a + b", example="f(1, b=2) ==> 3")),
    ("lists", task("return a + b", "def f(a: List[int], b):")),
    ("lists", task("return a + b", example="f([1], [2]) is [1, 2]")),
    ("lists", task("return [x for x in a]")),
    ("lists", task("b.append(a)")),
    ("tuples", task("return (a, b)")),
    ("tuples", task("return tuple(a)")),
    ("tuples", task("return a + b", "def f(a: Tuple[int, ...], b):")),
    ("dictionaries", task("return {}")),
    ("dictionaries", task("return {x: 0 for x in a}")),
    ("dictionaries", task("return a.items()")),
    ("sets", task("return set(a) & set(b)")),
    ("sets", task("return {a, b}")),
    ("sorting", task("return sorted(a)")),
    ("sorting", task("a.sort()\nreturn a")),
    ("searching", task("return a.index(b)")),
    ("searching", task("for x in a:\n    if x == b:\n        return x")),
    ("searching", task("while True:\n    break")),
    ("searching", task("return bisect.bisect(a, b)", before="import bisect\n\n\n")),
    ("extremes", task("return max(a)")),
    ("conditions", task("if a:\n    return b\nelif b:\n    return a")),
    ("nested loops", task("for x in a:\n    for y in b:\n        print(x, y)")),
    ("nested loops", task("return sum(x for y in a for x in y)")),
    ("nested loops", task("return sum(sum(x for x in y) for y in a)")),
    ("functions as values", task("return map(a, b)")),
    ("functions as values", task("return lambda: a")),
    ("recursion", task("return f(b, a)")),
    ("recursion", task("return g(b, a)", before="def g(a, b):\n    return f(b, a)\n\n\n")),
    ("mathematics", task("return a % b")),
    ("mathematics", task("return a * b")),
    ("mathematics", task("a //= b\nreturn a")),
    ("mathematics", task("return math.pi", before="import math\n\n\n")),
    ("mathematics", task("return round(a)")),
    ("bit operations", task("return a ^ b")),
    ("bit operations", task("return a << b")),
    (OTHER, task("return a")),
    (OTHER, task("return a == b", example="f(x, y) and f(*z)")),
]


@pytest.mark.parametrize(("category", "only"), ALONE, ids=range(len(ALONE)))
def test_each_rule_alone(category, only):
    assert categories_of(only) == [category]


def test_every_category_has_a_test():
    tested = {category for category, _ in ALONE} | {"parsing", "regular expressions"}
    assert tested == set(CATEGORIES)


@pytest.mark.parametrize(
    ("several", "categories"),
    [
        (task("return int(a.strip())"), ["strings", "parsing"]),
        (task("return a.split()"), ["strings", "parsing"]),
        (
            task("return re.sub(a, b)", before="import re\n\n\n"),
            ["strings", "parsing", "regular expressions"],
        ),
        (task("return [(x, y) for x, y in zip(a, b)]"), ["lists", "tuples"]),
        (
            task("return a", example="f({'k': (1, [2])}, {3})"),
            ["strings", "lists", "tuples", "dictionaries", "sets"],
        ),
        (task("return sorted(a, key=lambda x: -x)[0]"), ["sorting", "functions as values"]),
        (task("return bin(a)"), ["numbers", "bit operations"]),
    ],
)
def test_several_at_once(several, categories):
    assert categories_of(several) == categories


@pytest.mark.parametrize(
    ("lacking", "category"),
    [
        (task("return int(a)"), "parsing"),  # no string in sight
        (task("return set(a) | set(b)"), "bit operations"),
        (task("return '%s' % a"), "mathematics"),
        (task("return [0] * a"), "mathematics"),
        (task("return a in (1, 2)"), "tuples"),
        (task("a, b = b, a\nreturn a"), "tuples"),
        (task("return True", example="f(True, False)"), "numbers"),
        (task("return a", example="f([1], [2])"), "numbers"),
        (task("if a:\n    return b"), "conditions"),
        (task("return [x for x in a if x if b]"), "conditions"),
        (task("for x in a:\n    print(x)\nreturn a"), "searching"),
        (task("for x in a:\n    def g():\n        return x\n    print(g())"), "searching"),
        (task("for x in a:\n    print(x)\nfor x in b:\n    print(x)"), "nested loops"),
        (task("def g(x):\n    return x\nreturn g(a)"), "recursion"),
        (task("return a  # sorted(a) and 'text'"), "sorting"),
    ],
)
def test_what_only_looks_like_it(lacking, category):
    assert category not in categories_of(lacking)


def test_mbpps_form_a_text_with_an_assertion_and_the_whole_function():
    mbpp = {
        "task_id": "Mbpp/0",
        "prompt": '"""\nTurn a text round.\nassert turn_round ("a)b", [1]) == "b)a"\n"""\n',
        "canonical_solution": "\ndef turn_round(a, b):\n    return a[::-1]\n",
        "entry_point": "turn_round",
    }
    assert categories_of(mbpp) == ["strings", "lists"]


def test_the_reading_does_not_depend_on_other_fields():
    plain = task("return a % b")
    assert categories_of(
        {**plain, "base_input": [["text"]], "contract": "assert sorted(a)"}
    ) == categories_of(plain)


def test_the_demos_problems():
    found = {problem_id: categories_of(problem) for problem_id, problem in load_problems().items()}
    by_name = {
        load_problems()[problem_id]["entry_point"]: categories for problem_id, categories in found.items()
    }
    assert by_name["flip_word_order"] == ["strings", "parsing"]
    assert by_name["letter_histogram"] == ["strings", "dictionaries"]
    assert by_name["prime_test"] == ["numbers", "searching", "mathematics"]
    assert by_name["second_highest"] == ["sets", "sorting"]
    families = {problem_id: problem["family"] for problem_id, problem in load_problems().items()}
    for category, family in (("strings", "strings"), ("mathematics", "numbers")):
        assert all(category in found[problem_id] for problem_id in found if families[problem_id] == family)
    assert not any("strings" in found[problem_id] for problem_id in found if families[problem_id] == "lists")
    assert all(categories and OTHER not in categories for categories in found.values())


@pytest.mark.parametrize(
    "damaged",
    [
        {"prompt": "def f(:", "canonical_solution": "", "entry_point": "f", "task_id": "T/7"},
        {"prompt": "def g(): pass", "canonical_solution": "", "entry_point": "f", "task_id": "T/7"},
        {"prompt": "def f(): pass", "entry_point": "f", "task_id": "T/7"},
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_the_task(damaged):
    with pytest.raises(InputError, match="T/7"):
        categories_of(damaged)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "count"), [("HUMANEVAL_OVERRIDE_PATH", 164), ("MBPP_OVERRIDE_PATH", 378)]
)
def test_every_real_task_is_read(variable, count):
    path = os.environ.get(variable)
    if path is None:
        pytest.skip(f"{variable} does not name the data")
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        found = [categories_of(json.loads(line)) for line in file]
    assert len(found) == count
    assert sum(categories == [OTHER] for categories in found) < count / 20
    assert {category for categories in found for category in categories} >= {
        "strings",
        "lists",
        "recursion",
        "sorting",
    }
