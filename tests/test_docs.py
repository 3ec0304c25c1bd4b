"""The documents say what is there: paths, commands, options, keys, headings and messages that they name exist."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import typing
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tcaq_lightning.__main__ import COMMANDS
from tcaq_lightning.cli import parse_config
from tcaq_lightning.cli.arguments import called_with, options_of_call, read
from tcaq_lightning.cli.commands import command_function
from tcaq_lightning.config import Config
from tests.test_architecture import ORDER

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))
}
TREES = ("tcaq_lightning", "callbacks", "tests", "benchmarks", "configs", "docs")
HEADINGS_OF_METHOD = {
    "Quantizers",
    "Learned rounding",
    "TCR",
    "DAQ",
    "PAR",
    "Units and order",
    "Sensitivity weights",
    "The gate",
}
LONGEST_README = 120

each_page = pytest.mark.parametrize("page", PAGES)


@cache
def keys(kind: Any = Config, prefix: str = "") -> frozenset[str]:
    """Dotted names of all config keys and sections."""
    found: set[str] = set()
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        found.add(f"{prefix}{field.name}")
        for inner in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(inner):
                found |= keys(inner, f"{prefix}{field.name}.")
    return frozenset(found)


def command_lines(text: str, program: str) -> list[tuple[str, list[str]]]:
    """A program's commands in indented lines, and their arguments, with files in the place of placeholders."""
    found = []
    for line in re.findall(rf"^ {{4}}(?:python|torchrun|srun) (?:.* )?{program}.*$", text, re.MULTILINE):
        _, name, rest = re.split(f"({program})", line, maxsplit=1)
        rest = re.split(r"\s+# ", re.sub(r"\[(--[^\]]*)\]", r"\1", rest))[0]  # without comments, with optional parts
        for placeholder, value in {"CONFIG": "configs/w4a8.yaml", "RUN_DIR": "runs/x", " FILE": " README.md"}.items():
            rest = rest.replace(placeholder, value)
        found.append((name, shlex.split(rest)))
    return found


def parameters(module: str) -> set[str]:
    """Names of all parameters of a module's public functions, without importing it."""
    base = ROOT.joinpath(*module.split("."))
    tree = ast.parse((base / "__init__.py" if base.is_dir() else base.with_suffix(".py")).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return {a.arg for node in functions for a in (*node.args.args, *node.args.kwonlyargs)}


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= LONGEST_README


@each_page
def test_paths_exist(page: str) -> None:
    named = re.findall(rf"(?<![\w/.-])(?:{'|'.join(TREES)})/[\w./*-]*", PAGES[page])
    missing = [name for name in named if not list(ROOT.glob(name.rstrip("./")))]
    assert missing == []


@each_page
def test_links_to_files_exist(page: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", PAGES[page])
    here = (ROOT / page).parent
    assert [t for t in targets if "://" not in t and not (here / t).exists()] == []


@each_page
def test_commands_can_be_parsed(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for _, arguments in command_lines(PAGES[page], r"train\.py"):
        parse_config(arguments)
    for program, arguments in command_lines(PAGES[page], r"-m tcaq_lightning [a-z]+"):
        function = command_function(COMMANDS, program.split()[-1])
        called_with(function, read(arguments, list(options_of_call(function, {})), short=True).values)


@each_page
def test_options_of_benchmarks_exist(page: str) -> None:
    for program, arguments in command_lines(PAGES[page], r"-m (?:benchmarks|tcaq_lightning)\.[a-z_.]+"):
        options = {a.removeprefix("--") for a in arguments if a.startswith("--")}
        assert options <= parameters(program.removeprefix("-m ")), program


@each_page
def test_config_keys_exist(page: str) -> None:
    sections = "|".join(sorted({key.split(".")[0] for key in keys() if "." in key} - {"logging"}))
    named = re.findall(rf"`(?:--)?((?:{sections})\.[a-z_.]+)[`:]", PAGES[page])
    assert [key for key in named if key not in keys()] == []


@each_page
def test_modules_of_commands_exist(page: str) -> None:
    for module in re.findall(r"-m ((?:benchmarks|tcaq_lightning)(?:\.[a-z_]+)*)(?![.\w])", PAGES[page]):
        base = ROOT.joinpath(*module.split("."))
        assert base.with_suffix(".py").is_file() or (base / "__main__.py").is_file(), module


def test_rendered_names_exist() -> None:
    unknown = []
    for dotted in re.findall(r"^::: (tcaq_lightning\..+)$", PAGES["docs/api.md"], re.MULTILINE):
        *parents, name = dotted.split(".")
        module = ROOT.joinpath(*parents).with_suffix(".py")
        source = module if module.is_file() else ROOT.joinpath(*parents, "__init__.py")
        known = source.is_file() and re.search(rf"\b{name}\b", source.read_text(encoding="utf-8"))
        if not known and not list(ROOT.glob(f"{'/'.join([*parents, name])}*")):
            unknown.append(dotted)
    assert unknown == []


def test_headings_that_the_code_cites_exist() -> None:
    headings = set(re.findall(r"^## (.+)$", PAGES["docs/method.md"], re.MULTILINE))
    assert headings >= HEADINGS_OF_METHOD
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for tree in ("tcaq_lightning", "callbacks", "benchmarks")
        for path in sorted((ROOT / tree).rglob("*.py"))
    )
    cited = set(re.findall(r'docs/method\.md,\s+"([^"]+)"', source))
    assert cited <= headings


def test_the_rooms_are_those_of_the_package() -> None:
    drawn = (DOCS / "images" / "rooms.svg").read_text(encoding="utf-8")
    rooms = {room for floor in ORDER for room in floor}
    assert {room for room in rooms if not re.search(rf"\b{room}\b", drawn)} == set()
    assert {room for room in rooms if not re.search(rf"\b{room}\b", PAGES["docs/architecture.md"])} == set()


def strings_of_source() -> list[str]:
    """All string literals of the package and callbacks, … in the place of what is filled in."""
    found = []
    for path in (*(ROOT / "tcaq_lightning").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sdg]", "…", node.value))
    return found


def test_messages_are_said() -> None:
    source = strings_of_source()
    rows = [row for row in PAGES["docs/troubleshooting.md"].splitlines() if row.startswith("| ")]
    messages = [part for row in rows for part in re.findall(r"`([^`]+)`", row.split("|")[1]) if " " in part]
    assert len(messages) > 15
    wanted = {
        message: ".*".join(map(re.escape, filter(None, (p.strip() for p in message.split("…")))))
        for message in messages
    }
    unsaid = [m for m, pattern in wanted.items() if not any(re.search(pattern, s, re.DOTALL) for s in source)]
    assert unsaid == []
