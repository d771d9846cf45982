"""What README.md, docs/reference.md and the documents beside them show and name is what is there."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from package import python_files
from rich.console import Console

import pa_compiler
from benchmarks.cases import CASES
from pa_compiler.cli import main as cli
from pa_compiler.spec import PagedAttentionSpec

ROOT = Path(__file__).parent.parent
README, REFERENCE, DESIGN, CONTRIBUTING = (
    (ROOT / name).read_text() for name in ("README.md", "docs/reference.md", "DESIGN.md", "CONTRIBUTING.md")
)
FOLDERS, SUFFIXES = ("pa_compiler", "schedules", "templates", "tests", "benchmarks"), {".py", ".h", ".cc", ".j2"}
FILES = {path.name for path in ROOT.iterdir()}
DOCUMENTS = (
    "README.md",
    "DESIGN.md",
    "CONTRIBUTING.md",
    "docs/reference.md",
    "docs/bundle.md",
    "docs/engines.md",
    "docs/measurements.md",
    "docs/cuda.md",
)

# What differs from machine to machine, or with TVM's rounding from CPU to CPU.
VARIES = ("target", "pipeline", "time", "rate", "error", "bound")

every_document = pytest.mark.parametrize("document", DOCUMENTS)


def blocks(text, language):
    """The code blocks of a document in one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def section(text, heading):
    """What stands below a heading, up to the next one of its level or above."""
    level = heading.partition(" ")[0]
    return re.split(rf"^#{{2,{len(level)}}} ", text.partition(f"\n{heading}\n")[2], flags=re.MULTILINE)[0]


def rows(text, first):
    """The cells of the table whose first head is `first`, row by row."""
    table = re.split(r"\n(?!\|)", text[text.index(f"| {first} |") :])[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


EXAMPLES = [text for text in blocks(README, "console") if text.startswith("$ pa-compiler run")]


def test_python_example_runs(build_cache, tmp_path, monkeypatch, capsys):
    (code,) = blocks(README, "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "WorkItem(batch_start=0" in printed
    assert "def fused_decode" in printed


def test_reference_runs_as_one_program(build_cache, tmp_path, monkeypatch):
    codes = blocks(REFERENCE, "python")
    assert len(codes) > 5
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(codes), "reference.md", "exec"), {})


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.split("\n")[0][2:])
def test_command_prints_what_is_shown(build_cache, monkeypatch, example):
    monkeypatch.setattr(cli, "_STDOUT", Console(width=80))

    def steady(text):
        return [line.rstrip() for line in text.splitlines() if not line.startswith(VARIES)]

    command, _, shown = example.partition("\n")
    result = CliRunner().invoke(cli.main, shlex.split(command)[2:], catch_exceptions=False)
    assert result.exit_code == 0
    assert steady(result.stdout) == steady(shown)
    assert {line.split()[0] for line in shown.splitlines() if line} >= set(VARIES)


def test_verify_prints_what_is_shown(compiled, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    compiled(PagedAttentionSpec(32, 8, 128, 16, "bfloat16")).save("pa.so")
    (shown,) = (text for text in blocks(README, "console") if text.startswith("$ pa-compiler verify pa.so\n"))
    result = CliRunner().invoke(cli.main, ["verify", "pa.so", "--seconds", "0"], catch_exceptions=False)

    def steady(text):
        return [line.rstrip() for line in text.splitlines() if not line.startswith(("target", "draws", *VARIES))]

    assert steady(result.stdout) == steady(shown)[1:]


def help_of(words):
    """What a command says of itself."""
    result = CliRunner().invoke(cli.main, [*words, "--help"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@every_document
def test_every_command_named_exists(build_cache, document):
    for words in re.findall(r"`(pa-compiler [a-z][^`]*)`", (ROOT / document).read_text()):
        help_of(shlex.split(words)[1:])


def flag(field):
    return f"--{field.replace('_', '-')}"


def test_every_command_and_option_is_described(build_cache):
    """A field of the spec is an option by its own name; all others are options of some command."""
    described = section(REFERENCE, "## Command line")
    options = set()
    for name in cli.main.commands:
        assert f"`pa-compiler {name}" in described, name
        options |= set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", help_of([name])))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", described))
    assert options - {"--help"} <= named
    assert named - {"--help"} <= options | {flag(field.name) for field in dataclasses.fields(PagedAttentionSpec)}


def test_the_options_of_the_spec_stand_beside_the_commands_that_take_them():
    options, of, _ = rows(section(REFERENCE, "## Command line"), "options")[0]
    fields = {flag(field.name) for field in dataclasses.fields(PagedAttentionSpec)} - {"--inputs"} | {"--input"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", options)) == fields
    names = {name: {param.name for param in command.params} for name, command in cli.main.commands.items()}
    takers = {name for name, taken in names.items() if taken & {"num_heads", "specs"}}
    assert set(re.findall(r"\b[a-z]+\b", re.sub(r"in `--spec`", "", of))) == takers


def test_every_field_of_the_spec_is_described():
    fields = {field.name for field in dataclasses.fields(PagedAttentionSpec)}
    assert {cells[0].strip("`") for cells in rows(section(REFERENCE, "## Spec"), "field")} == fields


def described_calls():
    """(a call, its parameters) for each that the reference shows; `...` stands for a default that has no short text."""
    lines = [line for block in blocks(REFERENCE, "py") for line in block.splitlines()]
    return [re.fullmatch(r"([\w.]+)\((.*)\)", line).groups() for line in lines]


@pytest.mark.parametrize(("name", "parameters"), described_calls(), ids=lambda text: text if "(" not in text else "")
def test_signatures_are_as_described(name, parameters):
    owner, _, attribute = name.rpartition(".")
    owners = {"module": pa_compiler.Module, "gpu_module": pa_compiler.CudaModule, "": pa_compiler}
    found = getattr(owners.get(owner) or getattr(pa_compiler, owner), attribute)
    place: dict[str, object] = {}
    exec(f"def call({parameters}): ...", place)
    described = list(inspect.signature(place["call"]).parameters.values())
    taken = [each for each in inspect.signature(found).parameters.values() if each.name != "self"]
    assert [(each.name, each.kind) for each in described] == [(each.name, each.kind) for each in taken]
    for shown, real in zip(described, taken, strict=True):
        assert shown.default is ... or shown.default == real.default, shown.name


def test_every_method_is_described():
    public = {name for name, _ in inspect.getmembers(pa_compiler.CudaModule, inspect.isfunction) if name[0] != "_"}
    described = {name.rpartition(".")[2] for name, _ in described_calls()}
    assert public <= described


def test_every_variable_is_described():
    read = {name for path in python_files().values() for name in re.findall(r"\bPA_[A-Z_]+", path.read_text())}
    assert set(re.findall(r"`(PA_[A-Z_]+)`", section(REFERENCE, "## Environment variables"))) == read


def measured_rows(core):
    """What a table says of a file of benchmarks/results: one thread, and two where they were measured."""
    measured = json.loads((ROOT / f"benchmarks/results/{core}-decode.json").read_text())["cases"]
    measured = [case for case in measured if case["name"] in CASES]
    one, two = ([case for case in measured if case["num_threads"] == count] for count in (1, 2))

    def ratio(median, low, high):
        return f"{median:.2f} ({low:.2f}-{high:.2f})"

    for case, on_two in itertools.zip_longest(one, two):
        found = {result["contender"]: result for result in case["results"]}
        ours, packed, peer = found["ours"], found["ours-packed"], found[case["best_peer"]]
        rate = {name: case["flops"] / each["seconds"][0] / 1e9 for name, each in found.items() if each["seconds"]}
        cells = [
            *(f"{rate[each['contender']]:.1f}, {100 * each['of_limit'][0]:.0f} %" for each in (ours, packed)),
            f"{case['best_peer']} {rate[peer['contender']]:.1f}",
            *(ratio(*each["to_best_peer"]) for each in (ours, packed)),
        ]
        if on_two:
            better = (each["to_best_peer"][0] for each in on_two["results"] if each["contender"].startswith("ours"))
            cells.append(f"{max(better):.2f}")
        yield cells


@pytest.mark.parametrize(("core", "first"), [("znver1", "on Zen 1"), ("icelake-server", "on Ice Lake")])
def test_speed_is_as_last_measured(core, first):
    """Each table is that of a file of benchmarks/results."""
    table = rows(section(README, "## Speed"), f"query heads / kv heads of 128, {first}")
    assert [cells[1:] for cells in table] == list(measured_rows(core))
    assert len(table) == 11


@pytest.mark.parametrize(
    ("core", "words"), [("znver1", "{} to {} times as fast as"), ("icelake-server", "and {} to {} times")]
)
def test_the_first_lines_say_what_was_measured(core, words):
    ratios = [cells[3].partition(" ")[0] for cells in measured_rows(core)]
    assert words.format(min(ratios), max(ratios)) in README.partition("```")[0].replace("\n  ", " ")


@every_document
def test_every_test_named_exists(document):
    for file, name in re.findall(r"`tests/(\w+\.py)::(\w+)`", (ROOT / document).read_text()):
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), name


def test_each_promise_of_the_same_bits_has_a_test():
    assert all(re.search(r"`tests/\w+\.py::\w+`", test) for _, test in rows(README, "does not change with"))


def anchors(text):
    """What a link can lead to in a document: its headings, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@every_document
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\((?!https://)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        path = (ROOT / document).parent / file if file else ROOT / document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


@pytest.mark.parametrize("text", [DESIGN, CONTRIBUTING], ids=["DESIGN", "CONTRIBUTING"])
def test_every_file_named_exists(text):
    """Files and folders are named from the repository's root, or from pa_compiler/. NAME stands for one to be made."""
    named = re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|h|j2|md|cc|cu|json)|(?:[\w.-]+/)+)`", text)
    made = set(re.findall(r"`([\w./-]+)` \(new\)", text))
    missing = [name for name in named if not any((ROOT / place / name).exists() for place in ("", "pa_compiler"))]
    assert len(named) > 20
    assert {name for name in missing if "NAME" not in name} <= made


@pytest.mark.parametrize("text", [DESIGN, CONTRIBUTING], ids=["DESIGN", "CONTRIBUTING"])
def test_every_name_is_in_the_source(text):
    """Functions, classes, fields and variables; NAME is one to be made, and so are those of what is to come."""
    named = re.findall(r"`([A-Za-z_][\w.]*)`", text.partition("\n## Where the next things go\n")[0])
    assert len(named) > 20
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    words = {word for path in files for word in re.findall(r"\w+", path.read_text())}
    assert {name for name in named if not set(name.split(".")) <= words} <= {"NAME", *FILES}


def tree(text):
    """The folders of an indented list, each with the line that says what is in it."""
    folders, above = {}, []
    for indent, name, said in re.findall(r"^( {4,})([\w.-]+)/ +(\S.*)$", text, re.MULTILINE):
        above = [*above[: len(indent) // 2 - 2], name]
        folders["/".join(above)] = said
    return folders


def test_the_tree_has_every_folder():
    """Of the source; those of generated/ are a spec's each."""
    folders = tree(section(CONTRIBUTING, "## Where things are"))
    assert all((ROOT / folder).is_dir() for folder in folders), folders
    written = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ("pa_compiler", "schedules", "templates", "tests", "benchmarks", "examples", "docs")
        for path in (ROOT / top).rglob("*.*")
        if path.suffix != ".pyc"
    }
    assert written == folders.keys() - {"generated"}


def test_what_is_to_come_touches_twelve_files_at_most():
    lists = re.split(r"^### ", section(DESIGN, "## Where the next things go"), flags=re.MULTILINE)[1:]
    assert len(lists) == 1
    for each in lists:
        numbered = re.findall(r"^\d+\. `([^`]+)`(?: \(new\))?: ", each, re.MULTILINE)
        assert 3 <= len(set(numbered)) == len(re.findall(r"^\d+\. ", each, re.MULTILINE)) <= 12, each.partition("\n")[0]
