"""How the product's files import one another: no circles, one direction, and folders of a size to look through."""

import ast
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGES = {
    "dylora_moe": "dylora_moe",
    "eval": "dylora_moe.eval",
    "hub_export": "dylora_moe.hub_export",
    "modeling": "dylora_moe.modeling",
    "serving": "dylora_moe.serving",
}
# What each package may import of this project, itself included.
MAY_IMPORT = {
    "dylora_moe": {"dylora_moe", "eval", "hub_export", "modeling"},
    "eval": {"eval", "hub_export", "modeling"},
    "hub_export": {"hub_export", "modeling"},
    "modeling": {"modeling"},
    "serving": {"modeling", "serving"},
}
FOR_ALL = "dylora_moe/version.py"  # the one file that a package below the front door may import from it
THIRD_PARTY_OF_THE_MODEL = {"torch", "transformers", "safetensors", "huggingface_hub", "packaging", "triton"}
MOST_FILES = {"modeling": 17}
MOST_FILES_ELSEWHERE = 14


def product_files() -> list[str]:
    """All Python files of the product, relative to the repository's root."""
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def module_name(file: str) -> str:
    package, _, inside = file.partition("/")
    dotted = inside.removesuffix(".py").replace("/", ".")
    return f"{PACKAGES[package]}.{dotted}".removesuffix(".__init__")


MODULES = {module_name(file): file for file in product_files()}


def imported_names(file: str) -> set[str]:
    """Everything that a file imports anywhere, in functions and for type checking too, by absolute dotted names."""
    name = module_name(file)
    package = name if file.endswith("/__init__.py") else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level > 0:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def imported_files(file: str) -> set[str]:
    """The product's files that a file imports: `from a import b` is a's, unless b is a module itself."""
    found = set()
    for name in imported_names(file):
        module = name if name in MODULES else name.rpartition(".")[0]
        if module in MODULES:
            found.add(MODULES[module])
    return found - {file}


def room(file: str) -> str:
    """The sub-folder that a file lies in, or the file itself where it lies directly in a package."""
    package, *folders, _ = file.split("/")
    return f"{package}/{folders[0]}" if folders else file


FILES = {file: imported_files(file) for file in product_files()}


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Return nodes that import one another in a circle, first and last the same; an empty list where none do."""
    done: set[str] = set()
    for start in sorted(imports):
        path = [start]
        waiting = [sorted(imports[start])]
        while path:
            if not waiting[-1]:
                done.add(path.pop())
                waiting.pop()
                continue
            following = waiting[-1].pop()
            if following in path:
                return [*path[path.index(following) :], following]
            if following not in done:
                path.append(following)
                waiting.append(sorted(imports[following]))
    return []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"a"}}) == ["a", "a"]


def test_relative_and_late_imports_are_read():
    assert "eval/peft_moe.py" in FILES["eval/__init__.py"]  # for type checking
    assert "modeling/cache_dylora_moe.py" in FILES["modeling/modeling_dylora_moe.py"]
    assert any(file.startswith("hub_export/") for file in FILES["dylora_moe/cli.py"])


def test_no_file_imports_itself_by_way_of_others():
    assert circle(FILES) == []


def test_no_room_imports_itself_by_way_of_others():
    rooms: dict[str, set[str]] = {room(file): set() for file in FILES}
    for file, imports in FILES.items():
        rooms[room(file)] |= {room(imported) for imported in imports} - {room(file)}
    assert circle(rooms) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package):
    wrong = [
        f"{file} imports {imported}"
        for file, imports in FILES.items()
        if file.startswith(f"{package}/")
        for imported in sorted(imports)
        if imported.split("/")[0] not in MAY_IMPORT[package] and imported != FOR_ALL
    ]
    assert wrong == []


def test_the_model_imports_what_transformers_brings_and_its_own_files():
    allowed = THIRD_PARTY_OF_THE_MODEL | set(sys.stdlib_module_names)
    for file in FILES:
        if file.startswith("modeling/"):
            own = {name for name in imported_names(file) if name.startswith("dylora_moe.modeling.")}
            assert {name.split(".")[0] for name in imported_names(file) - own} <= allowed, file


def test_triton_is_imported_in_a_try_only():
    for file in FILES:
        tree = ast.parse((ROOT / file).read_text())
        tried = {
            node
            for attempt in ast.walk(tree)
            if isinstance(attempt, ast.Try)
            for statement in attempt.body
            for node in ast.walk(statement)
        }
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            if any(name.split(".")[0] == "triton" for name in names):
                assert node in tried, file


def test_the_hubs_loader_finds_every_file_of_the_model():
    """It follows `from .x import Y`, and neither `from . import x` nor folders."""
    for file in (ROOT / "modeling").rglob("*.py"):
        assert file.parent == ROOT / "modeling", file
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                assert node.level == 1 and node.module and "." not in node.module, file
                # Files of fast decoding are optional: whatever imports one does without it.
                there = (file.parent / f"{node.module}.py").is_file() or node.module.startswith("fast_")
                assert there, file


def test_every_folder_can_be_looked_through():
    sizes: dict[str, int] = {}
    for file in FILES:
        folder = file.rpartition("/")[0]
        sizes[folder] = sizes.get(folder, 0) + 1
    too_large = {
        folder: size for folder, size in sizes.items() if size > MOST_FILES.get(folder, MOST_FILES_ELSEWHERE)
    }
    assert too_large == {}


def test_every_folder_says_what_is_inside_and_is_packaged():
    """A folder without an `__init__` is none of the packages that `pyproject.toml` lists."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    for folder in sorted({file.rpartition("/")[0] for file in FILES}):
        assert ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())), folder
        name = module_name(f"{folder}/__init__.py")
        assert f'"{name}"' in pyproject, name
