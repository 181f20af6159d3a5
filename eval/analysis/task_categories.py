"""What kinds of work a task asks for, read from its signature, its examples and its reference solution.

A task has every category whose rule it meets, and `other` if it meets none. The rules read Python's own
syntax tree of `prompt` + `canonical_solution` (with the helpers that the prompt gives; texts of docstrings
and comments are not read), and the arguments of the calls of `entry_point` that the prompt shows as examples.
They are about how the reference solves the task; another solution may do it otherwise. The rules:

    strings: a parameter or the result is annotated as `str`, or an example's argument is or holds a string;
        or the code calls a method that only strings have (`split`, `join`, `lower`, ...), calls `str`, `chr`
        or `ord`, has an f-string, or imports `string` or `re`
    numbers: a parameter itself is a number: annotated as `int`, `float` or `complex`, a number in an example,
        given to `range`, `bin` or `abs`, or added to, subtracted from, divided by or compared with a number
        that stands in the code
    lists: annotated as a list or sequence, an example's argument is or holds a list; or the code has a list
        display or comprehension, calls `list`, or `append`, `extend` or `insert`
    tuples: annotated as a tuple, an example's argument is or holds a tuple; or the code calls `tuple`, or
        returns a tuple, or puts tuples into another collection
    dictionaries: annotated as a dictionary, an example's argument is or holds one; or the code has a
        dictionary display or comprehension, calls `dict`, `Counter`, `defaultdict` or `OrderedDict`, or
        `items`, `values`, `keys` or `setdefault`
    sets: annotated as a set, an example's argument is or holds one; or the code has a set display or
        comprehension, or calls `set` or `frozenset`
    sorting: the code calls `sorted` or `sort`, or imports `heapq`
    searching: the code calls `index`, `find`, `rfind`, `next`, `any`, `all`, or imports `bisect`; or leaves a
        loop early (`break`, or `return` inside it)
    extremes: the code calls `min`, `max`, `nlargest` or `nsmallest`
    conditions: the code chooses between three or more ways: two or more `if` or `elif` statements or
        conditional expressions within one function, filters of comprehensions not counted
    nested loops: a `for` or `while` inside another, or a comprehension with several `for`; a comprehension
        counts as a loop
    functions as values: the code has a `lambda`, or calls `map`, `filter` or `reduce`
    recursion: a function calls itself, directly or through others of the code
    parsing: text is turned into data: `int` or `float` of something other than a number in the code together
        with strings (as above), or `split`, `splitlines`, `partition`, `eval`, `literal_eval`, `strptime`, or
        an import of `re` or `json`
    regular expressions: the code imports `re`
    mathematics: the code imports `math`, `cmath`, `fractions`, `decimal` or `statistics`, calls `pow`,
        `divmod` or `round`, or has the operators `**`, `/`, `//`, `%` or `*` (the last two not next to a text
        or list that stands in the code, where they fill in and repeat)
    bit operations: the code has `<<`, `>>` or `~`, calls `bin` or `bit_length`, or has `&`, `|` or `^`
        without having sets
    other: none of these
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dylora_moe.hub_export.errors import InputError


OTHER = "other"
CATEGORIES = (
    "strings",
    "numbers",
    "lists",
    "tuples",
    "dictionaries",
    "sets",
    "sorting",
    "searching",
    "extremes",
    "conditions",
    "nested loops",
    "functions as values",
    "recursion",
    "parsing",
    "regular expressions",
    "mathematics",
    "bit operations",
    OTHER,
)

STRING_METHODS = frozenset(name for name in dir(str) if not name.startswith("_") and not hasattr(list, name))
ANNOTATIONS = {
    "strings": {"str", "AnyStr"},
    "lists": {"list", "List", "Sequence", "MutableSequence"},
    "tuples": {"tuple", "Tuple", "NamedTuple"},
    "dictionaries": {"dict", "Dict", "Mapping", "DefaultDict", "OrderedDict", "Counter"},
    "sets": {"set", "Set", "frozenset", "FrozenSet", "AbstractSet"},
}
KINDS = {"strings": str, "lists": list, "tuples": tuple, "dictionaries": dict, "sets": (set, frozenset)}
DISPLAYS = {
    "strings": (ast.JoinedStr,),
    "lists": (ast.List, ast.ListComp),
    "tuples": (),
    "dictionaries": (ast.Dict, ast.DictComp),
    "sets": (ast.Set, ast.SetComp),
}
CALLS = {
    "strings": STRING_METHODS | {"str", "chr", "ord"},
    "lists": {"list", "append", "extend", "insert"},
    "tuples": {"tuple"},
    "dictionaries": {
        "dict",
        "Counter",
        "defaultdict",
        "OrderedDict",
        "items",
        "values",
        "keys",
        "setdefault",
    },
    "sets": {"set", "frozenset"},
    "sorting": {"sorted", "sort"},
    "searching": {"index", "find", "rfind", "next", "any", "all"},
    "extremes": {"min", "max", "nlargest", "nsmallest"},
    "functions as values": {"map", "filter", "reduce"},
    "parsing": {"split", "splitlines", "partition", "eval", "literal_eval", "strptime"},
    "mathematics": {"pow", "divmod", "round"},
    "bit operations": {"bin", "bit_length"},
}
IMPORTS = {
    "strings": {"string", "re"},
    "sorting": {"heapq"},
    "searching": {"bisect"},
    "parsing": {"re", "json"},
    "regular expressions": {"re"},
    "mathematics": {"math", "cmath", "fractions", "decimal", "statistics"},
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LOOPS = (ast.For, ast.AsyncFor, ast.While)
NUMBERS = (int, float, complex)


def categories_of(task: dict[str, Any]) -> list[str]:
    """List a task's categories, one or more, in the order of `CATEGORIES`.

    Args:
        task: a task of EvalPlus's: its `prompt`, `canonical_solution` and `entry_point` are read, nothing
            else.

    Raises:
        InputError: these are no Python code with that function.
    """
    reading = _read(task)
    found = {category for category in CATEGORIES if _has_signs(category, reading)}
    found |= {category for category, holds in _RULES.items() if holds(reading, found)}
    return [category for category in CATEGORIES if category in found] or [OTHER]


@dataclass
class _Reading:
    """What the rules look at. `nodes` are those of the tree; `parameters` the names of the entry point's."""

    nodes: list[ast.AST]
    functions: list[ast.FunctionDef | ast.AsyncFunctionDef]
    parameters: set[str]
    parameter_annotations: list[ast.expr]
    annotations: set[str]
    calls: set[str]
    imports: set[str]
    arguments: list[Any]


def _read(task: dict[str, Any]) -> _Reading:
    try:
        nodes = list(ast.walk(ast.parse(task["prompt"] + task["canonical_solution"])))
        functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
        # the last of the name is the one that Python would call
        entry = [function for function in functions if function.name == task["entry_point"]][-1]
    except (SyntaxError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"the reference solution of task {task.get('task_id')} cannot be read ({type(error).__name__}: {error}); "
            "is the data set EvalPlus's?"
        ) from error
    parameters = [*entry.args.posonlyargs, *entry.args.args, *entry.args.kwonlyargs]
    annotated = [parameter.annotation for parameter in parameters if parameter.annotation is not None]
    return _Reading(
        nodes=nodes,
        functions=functions,
        parameters={parameter.arg for parameter in parameters},
        parameter_annotations=annotated,
        annotations={
            name for part in [*annotated, entry.returns] if part is not None for name in _names(part)
        },
        calls={_called(node) for node in nodes if isinstance(node, ast.Call)},
        imports={module for node in nodes for module in _modules(node)},
        arguments=list(_example_arguments(task["prompt"], task["entry_point"])),
    )


def _has_signs(category: str, reading: _Reading) -> bool:
    """Apply the part of a category's rule that is a name, a type or a kind of expression."""
    return bool(
        reading.annotations & ANNOTATIONS.get(category, set())
        or reading.calls & CALLS.get(category, set())
        or reading.imports & IMPORTS.get(category, set())
        or any(isinstance(node, DISPLAYS.get(category, ())) for node in reading.nodes)
        or any(_holds(argument, KINDS.get(category, ())) for argument in reading.arguments)
    )


def _takes_numbers(reading: _Reading, found: set[str]) -> bool:
    def of_parameter(node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id in reading.parameters

    annotated = any(
        isinstance(part, ast.Name) and part.id in ("int", "float", "complex")
        for part in reading.parameter_annotations
    )
    shown = any(
        isinstance(argument, NUMBERS) and not isinstance(argument, bool) for argument in reading.arguments
    )
    if annotated or shown:
        return True
    for node in reading.nodes:
        if (
            isinstance(node, ast.Call)
            and _called(node) in ("range", "bin", "abs")
            and any(map(of_parameter, node.args))
        ):
            return True
        sides: list[ast.expr] = []
        if isinstance(node, ast.BinOp) and isinstance(
            node.op, (ast.Add, ast.Sub, ast.Div, ast.FloorDiv, ast.Mod)
        ):
            sides = [node.left, node.right]
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        if any(map(of_parameter, sides)) and any(map(_is_number, sides)):
            return True
    return False


def _makes_tuples(reading: _Reading, found: set[str]) -> bool:
    for node in reading.nodes:
        inside: list[ast.AST | None] = []
        if isinstance(node, ast.Return):
            inside = [node.value]
        elif isinstance(node, (ast.List, ast.Set, ast.Tuple)) and isinstance(
            getattr(node, "ctx", ast.Load()), ast.Load
        ):
            inside = list(node.elts)
        elif isinstance(node, ast.Dict):
            inside = [*node.keys, *node.values]
        elif isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp)):
            inside = [node.elt]
        elif isinstance(node, ast.Call) and _called(node) in ("append", "add", "insert"):
            inside = list(node.args)
        if any(isinstance(part, ast.Tuple) for part in inside):
            return True
    return False


def _leaves_loops(reading: _Reading, found: set[str]) -> bool:
    return any(
        isinstance(inner, (ast.Break, ast.Return))
        for node in reading.nodes
        if isinstance(node, LOOPS)
        for inner in _within_function(node)
    )


def _chooses(reading: _Reading, found: set[str]) -> bool:
    return any(
        sum(isinstance(node, (ast.If, ast.IfExp)) for node in _within_function(function)) >= 2
        for function in reading.functions
    )


def _nests_loops(reading: _Reading, found: set[str]) -> bool:
    loops = [node for node in reading.nodes if isinstance(node, (*LOOPS, *COMPREHENSIONS))]
    return any(
        len(getattr(loop, "generators", [])) > 1
        or any(isinstance(inner, (*LOOPS, *COMPREHENSIONS)) for inner in _within_function(loop))
        for loop in loops
    )


def _passes_functions(reading: _Reading, found: set[str]) -> bool:
    return any(isinstance(node, ast.Lambda) for node in reading.nodes)


def _recurs(reading: _Reading, found: set[str]) -> bool:
    called = {
        function.name: {_called(node) for node in ast.walk(function) if isinstance(node, ast.Call)}
        for function in reading.functions
    }
    for name in called:
        reached: set[str] = set()
        waiting = set(called[name])
        while waiting:
            other = waiting.pop()
            if other in called and other not in reached:
                reached.add(other)
                waiting |= called[other]
        if name in reached:
            return True
    return False


def _parses(reading: _Reading, found: set[str]) -> bool:
    return "strings" in found and any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("int", "float")
        and bool(node.args)
        and isinstance(node.args[0], (ast.Name, ast.Subscript, ast.Call))
        for node in reading.nodes
    )


def _calculates(reading: _Reading, found: set[str]) -> bool:
    for node in reading.nodes:
        if isinstance(node, (ast.BinOp, ast.AugAssign)):
            if isinstance(node.op, (ast.Pow, ast.Div, ast.FloorDiv)):
                return True
            sides = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.value]
            if isinstance(node.op, (ast.Mod, ast.Mult)) and not any(map(_is_text_or_list, sides)):
                return True
    return False


def _works_on_bits(reading: _Reading, found: set[str]) -> bool:
    operators = [
        node.op for node in reading.nodes if isinstance(node, (ast.BinOp, ast.UnaryOp, ast.AugAssign))
    ]
    shared_with_sets = (ast.BitAnd, ast.BitOr, ast.BitXor)
    return any(
        isinstance(operator, (ast.LShift, ast.RShift, ast.Invert))
        or (isinstance(operator, shared_with_sets) and "sets" not in found)
        for operator in operators
    )


# the parts of rules that look at how expressions and statements lie in each other
_RULES = {
    "numbers": _takes_numbers,
    "tuples": _makes_tuples,
    "searching": _leaves_loops,
    "conditions": _chooses,
    "nested loops": _nests_loops,
    "functions as values": _passes_functions,
    "recursion": _recurs,
    "parsing": _parses,
    "mathematics": _calculates,
    "bit operations": _works_on_bits,
}


def _example_arguments(prompt: str, entry_point: str) -> Iterator[Any]:
    """Collect the literal arguments of calls of the entry point in a prompt, such as `>>> f("a", 2)`."""
    for match in re.finditer(rf"(?<!def )\b{re.escape(entry_point)}\s*\(", prompt):
        # a text may hold brackets, so the call ends at the first one with which it is Python
        for end in (bracket.end() for bracket in re.finditer(r"\)", prompt[match.start() :])):
            try:
                call = ast.parse(prompt[match.start() :][:end], mode="eval").body
            except (SyntaxError, ValueError):
                continue
            for argument in [*call.args, *(keyword.value for keyword in call.keywords)]:
                try:
                    yield ast.literal_eval(argument)
                except (ValueError, TypeError, SyntaxError):
                    continue  # a name or an expression
            break


def _holds(value: Any, kinds: Any) -> bool:
    """Whether a value is of one of these kinds, or holds one that is."""
    if isinstance(value, kinds):
        return True
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return isinstance(value, (list, tuple, set, frozenset)) and any(_holds(part, kinds) for part in value)


def _names(annotation: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} | {
        node.attr for node in ast.walk(annotation) if isinstance(node, ast.Attribute)
    }


def _called(call: ast.Call) -> str:
    """Return the last part of what is called: `append` of `result.append(1)`."""
    return getattr(call.func, "id", None) or getattr(call.func, "attr", "")


def _modules(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module.split(".")[0]}
    return set()


def _within_function(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below one, without those of functions that are defined in it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (*FUNCTIONS, ast.Lambda)):
            yield child
            yield from _within_function(child)


def _is_number(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, NUMBERS)
        and not isinstance(node.value, bool)
    )


def _is_text_or_list(node: ast.AST) -> bool:
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_text or isinstance(node, (ast.JoinedStr, ast.List, ast.ListComp, ast.Tuple))
