"""The documentation against the source: commands, options, keys, links, anchors and words."""

import argparse
import ast
import importlib.util
import re
import shlex
import time
import tokenize
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for folder in (ROOT, DOCS, *(ROOT / "models").glob("**/"), *(ROOT / "examples").glob("**/"), ROOT / ".github")
    for path in folder.glob("*.md")
    if folder != ROOT or path.name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
)

# Words that users do not read, and the word to use. Whole words, any case.
AVOIDED = {
    "room": "module, package, space",
    "rooms": "modules, packages",
    "house": "project",
    "mend": "fix",
    "mends": "fixes",
    "mended": "fixed",
    "mending": "wrong, fixing",
    "stand": "is",
    "stands": "is",
    "tell": "report, state, show",
    "tells": "reports, states, shows",
    "telling": "reporting",
    "told": "reported, configured",
    "so many": "N",
    "rung": "alarm rule",
    "rungs": "alarm rules",
    "ladder": "alarm rules",
    "forgive": "clear the evidence",
    "relearn": "recalibrate",
}
ALLOWED: dict[str, tuple[str, ...]] = {}  # page or module: words that it may have


def _generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stonechat_docs_generate", DOCS / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _generate()


def _without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def _fences(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


# --- generated pages --------------------------------------------------------------------------------------------------


def test_generated_pages_are_what_the_source_gives():
    for name, text in generate.pages().items():
        assert (DOCS / name).read_text() == text, f"docs/{name} is out of date: run python docs/generate.py"


def test_every_verb_and_every_option_is_in_the_page():
    """Without the generator's own table: from what argparse itself would accept."""
    page = (DOCS / "cli.md").read_text()
    sections = re.split(r"^##+ ", page, flags=re.MULTILINE)
    by_name = {section.split("\n", 1)[0]: section for section in sections}
    commands = list(generate.parsers())
    assert len(commands) > 30
    for name, _, parser in commands:
        assert name in by_name, f"docs/cli.md has no section for `{name}`"
        for flag in parser._option_string_actions:
            if flag not in ("-h", "--help"):
                assert re.search(rf"`{re.escape(flag)}[ `\[]", by_name[name]), f"docs/cli.md: `{name}` lacks {flag}"


def test_every_argument_of_every_command_has_a_help_text():
    missing = [
        f"{name} {'/'.join(action.option_strings) or action.dest}"
        for name, _, parser in generate.parsers()
        for action in parser._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert not missing, ", ".join(missing)


def test_every_configuration_key_is_in_the_page():
    from stonechat.linux.config_keys import KEYS

    page = (DOCS / "configuration.md").read_text()
    for section, keys in KEYS.items():
        part = page.split(f"## [{section}]\n", 1)[1].split("\n## ", 1)[0]
        for key in keys:
            assert f"| `{key}` |" in part, f"docs/configuration.md: [{section}] lacks {key}"


def test_every_wire_topic_code_and_result_is_in_the_page():
    from stonechat_tools.fleet import wire

    page = (DOCS / "wire-protocol.md").read_text()
    for name, code in wire.COMMANDS.items():
        assert f"| {code} | {name} |" in page
    for word in (*wire.RESULTS, *wire.FLAGS.values()):
        assert word in page, word
    for number, name in wire.FLAGS.items():
        assert f"| {number} | {name} |" in page


def test_api_pages_hold_every_documented_public_name(tmp_path):
    generate.api_pages(tmp_path)
    text = (tmp_path / "stonechat.md").read_text()
    assert ":::{py:module} stonechat.agent" in text and "{py:class} Agent(" in text
    assert "{py:method} tick()" in text and ":::{py:property} due_in_ms" in text
    (tmp_path / "old.md").write_text("of a package that is gone")
    generate.api_pages(tmp_path)
    assert not (tmp_path / "old.md").exists()


# --- links, commands --------------------------------------------------------------------------------------------------


def _anchors(path: Path) -> set[str]:
    found: dict[str, int] = {}
    out = set()
    for heading in re.findall(r"^#+ +(.+?) *$", _without_fences(path.read_text()), flags=re.MULTILINE):
        name = generate.anchor(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.replace("`", "")))
        out.add(name if name not in found else f"{name}-{found[name]}")
        found[name] = found.get(name, 0) + 1
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_and_anchors_resolve(page):
    text = re.sub(r"`[^`\n]*`", "", _without_fences(page.read_text()))
    for target in re.findall(r"(?<!\\)\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} is not there"
        assert file.is_relative_to(ROOT), f"{page.name}: {target} leaves the repository"
        if anchor:
            assert anchor in _anchors(file), f"{page.name}: {target} has no such heading"


def test_every_page_is_linked_from_the_index():
    index = (DOCS / "index.md").read_text()
    for page in DOCS.glob("*.md"):
        linked = f"({page.name})" in index or page.name == "index.md"
        assert linked or page.stem in (DOCS / "conf.py").read_text(), f"{page.name} is linked from nowhere"


def _console_lines(text: str) -> list[str]:
    joined = "".join(_fences(text, "console")).replace("\\\n", " ")
    return [line[2:] for line in joined.split("\n") if line.startswith("$ ")]


def _commands(line: str) -> list[list[str]]:
    """A console line -> its `stonechat ...` and `stonechat-agent ...` words, without comments and what follows."""
    words = shlex.split(line, comments=True)
    out = []
    for i, word in enumerate(words):
        if Path(word).name in ("stonechat", "stonechat-agent") and (i == 0 or words[i - 1] in ("sudo", "&&", ";", "|")):
            end = next((j for j in range(i, len(words)) if words[j] in ("&&", ";", "|", ">", "&")), len(words))
            out.append([Path(word).name, *words[i + 1 : end]])
    return out


def test_console_lines_name_existing_verbs_and_options():
    known = {name: parser for name, _, parser in generate.parsers()}
    seen = 0
    for page in PAGES:
        for line in _console_lines(page.read_text()):
            for command in _commands(line):
                name, rest = command[0], command[1:]
                while rest and f"{name} {rest[0]}" in known:
                    name, rest = f"{name} {rest[0]}", rest[1:]
                assert name in known, f"{page.name}: no such command: {line}"
                flags = known[name]._option_string_actions
                for word in rest:
                    if word.startswith("-") and not re.match(r"-\d", word):
                        assert word.split("=")[0] in flags or word == "--help", f"{page.name}: {word} in: {line}"
                seen += 1
    assert seen > 60


def test_commands_in_code_spans_name_existing_verbs_options_and_jobs():
    from stonechat_tools.proofs import soak

    known = {name: parser for name, _, parser in generate.parsers()}
    seen = 0
    for page in PAGES:
        for span in re.findall(r"`(stonechat(?:-agent)? [^`]*)`", _without_fences(page.read_text())):
            words = span.split()
            if words[1] == "--version":
                continue
            name, rest = words[0], words[1:]
            while rest and f"{name} {rest[0]}" in known:
                name, rest = f"{name} {rest[0]}", rest[1:]
            assert name in known, f"{page.name}: no such command: {span}"
            flags = known[name]._option_string_actions
            assert all(word in flags for word in rest if word.startswith("-")), f"{page.name}: {span}"
            if name == "stonechat soak":
                assert all(word in soak.SOAKS for word in rest[:1] if not word.startswith("-")), span
            seen += 1
    assert seen > 40


def _defined(module: str) -> set[str]:
    """The names that a module of the agent or the tools defines or imports, its submodules included."""
    path = ROOT / ("agent" if module.split(".")[0] == "stonechat" else "tools") / Path(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names = {part.stem for part in path.glob("*")} if path.is_dir() else set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


PACKAGES = ("stonechat", "stonechat_tools")


def test_python_in_the_pages_imports_names_that_exist():
    seen = 0
    for page in PAGES:
        for code in _fences(page.read_text(), "python"):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in PACKAGES:
                    missing = {alias.name for alias in node.names} - _defined(str(node.module))
                    assert not missing, f"{page.name}: {node.module} has no {missing}"
                    seen += 1
    assert seen >= 6


def test_the_bounds_in_the_page_are_those_of_the_source():
    row = r"^\| [^|]+ \| ([\d,]+) \| `(\w+)` \| \[[^\]]+\]\(([^)]+)\) \|$"
    rows = re.findall(row, (DOCS / "limits.md").read_text(), flags=re.MULTILINE)
    assert len(rows) >= 10
    for number, name, path in rows:
        found = re.search(rf"^{name} = (?:const\()?([\d_ <]+)", (DOCS / path).read_text(), flags=re.MULTILINE)
        assert found, f"{path} has no {name}"
        value = eval(found.group(1))  # digits and shifts only
        assert value == int(number.replace(",", "")), f"{name} is {value}, docs/limits.md says {number}"


def test_every_fault_of_the_world_is_in_the_page():
    from stonechat_tools.proofs.world import chaos

    rows = set(re.findall(r"^\| (\w+) \|", (DOCS / "faults.md").read_text(), flags=re.MULTILINE))
    assert set(chaos.KINDS) <= rows, set(chaos.KINDS) - rows


def test_the_trace_in_the_page_is_one(tmp_path):
    from stonechat_tools.traces.files import read_trace

    path = tmp_path / "example.csv"
    path.write_text(_fences((DOCS / "trace-format.md").read_text(), "text")[0])
    assert len(read_trace(str(path))) == 1


def test_the_program_that_embeds_the_agent_runs(tmp_path):
    """docs/embedding.md's first program, against a real broker, until it is connected and has scored a window."""
    from stonechat_tools.fleet.local_broker import LocalBroker

    code = _fences((DOCS / "embedding.md").read_text(), "python")[0]
    assert len([line for line in code.split("\n") if line]) <= 9
    with LocalBroker() as broker:
        for a, b in (
            ('"broker.lan")', f'"127.0.0.1", {broker.port})'),
            ('"model.tflite"', repr(str(ROOT / "models/linux-proc-1/model.tflite"))),
            ('"stonechat-data"', repr(str(tmp_path / "data"))),
            ("while True:", "while agent.windows < 1 and clock() < until:"),
        ):
            assert a in code, a
            code = code.replace(a, b)
        names = {"KEY": bytes(range(32)), "clock": time.monotonic, "until": time.monotonic() + 60}
        exec(compile(code, "embedding.md", "exec"), names)
        agent = names["agent"]
        assert agent.windows == 1 and not agent.errors, agent.last_error
        assert agent._client.connected and not agent.offline
        agent.close()


def test_make_targets_in_the_pages_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        for line in _console_lines(page.read_text()):
            for target in re.findall(r"(?:^|&& )make ([a-z-]+)", line):
                assert target in targets, f"{page.name}: make {target}"


def test_files_named_in_code_spans_of_commands_exist():
    """`pytest tools/tests/x.py`, `python docs/generate.py`: a file that a page says to run is there."""
    seen = 0
    for page in PAGES:
        for path in re.findall(r"(?:pytest|python3?)(?: -[a-z]+)* ([\w/]+\.py)", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
            seen += 1
    assert seen >= 3


# --- words ------------------------------------------------------------------------------------------------------------


def avoided(text: str) -> list[str]:
    pattern = r"\b(" + "|".join(sorted(AVOIDED, key=len, reverse=True)) + r")\b"
    return [found.lower() for found in re.findall(pattern, text, flags=re.IGNORECASE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_do_without_the_avoided_words(page):
    found = [word for word in avoided(page.read_text()) if word not in ALLOWED.get(page.name, ())]
    assert not found, f"{page.name}: " + ", ".join(f"{word} ({AVOIDED[word]})" for word in found)


SOURCES = sorted(
    path
    for folder in ("agent", "tools", "docs", "examples", "models")
    for path in (ROOT / folder).glob("**/*.py")
    if path.parent.name != "tests"
)


def texts(path: Path) -> str:
    """The docstrings, other strings and comments of a module, without the expressions of f-strings."""
    with open(path, "rb") as file:
        kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
        found = [token.string for token in tokenize.tokenize(file.readline) if token.type in kinds]
    return "\n".join(re.sub(r"\{[^{}]*\}|\brooms?\d", "", text) if text[:1] in "fF" else text for text in found)


def test_sources_do_without_the_avoided_words():
    assert len(SOURCES) > 150
    found = {
        f"{path.relative_to(ROOT)}: {word} ({AVOIDED[word]})"
        for path in SOURCES
        for word in avoided(texts(path))
        if word not in ALLOWED.get(path.name, ())
    }
    assert not found, "\n".join(sorted(found))


def test_other_files_that_users_read_do_without_the_avoided_words():
    files = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "tools/setup.sh"]
    for pattern in ("agent/**/*.pyi", "agent/**/*.cddl", "agent/**/*.service", "models/*/*.toml", "examples/**/*.toml"):
        files += sorted(ROOT.glob(pattern))
    assert len(files) > 15
    found = {
        f"{file.relative_to(ROOT)}: {word} ({AVOIDED[word]})" for file in files for word in avoided(file.read_text())
    }
    assert not found, "\n".join(sorted(found))


def test_modules_named_in_docstrings_and_comments_exist():
    """A file that was renamed leaves no reference behind: "features.py", "int8/network.py"."""
    files = [
        path
        for folder in ("agent", "tools", "firmware_tests", "docs", "examples", "models")
        for path in (ROOT / folder).glob("**/*.py")
    ]
    known = {"/".join(path.parts[-i:]) for path in files for i in range(1, 6)} | {
        "_boot.py",
        "boot.py",
        "main.py",
        "manifest.py",
        "stonechat_device.py",  # what `provision add --board` makes
    }
    folders = {part for path in files for part in path.relative_to(ROOT).parts}
    gone = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        if path.parent.name != "tests"
        for name in re.findall(r"(?<![\w/.}])(?:[a-z_0-9]+/)*[a-z_0-9]+\.py\b", texts(path))
        if name not in known and ("/" not in name or name.split("/")[0] in folders)  # others are of other projects
    }
    assert not gone, "\n".join(sorted(gone))


def test_texts_of_a_source_leave_names_out(tmp_path):
    path = tmp_path / "example.py"
    path.write_text('def tell(room):  # a comment\n    """Doc."""\n    return f"in {room}: {room:>3}" + "a rung"\n')
    assert "a comment" in texts(path) and "Doc." in texts(path)
    assert avoided(texts(path)) == ["rung"]


def test_the_search_for_avoided_words_finds_them():
    assert avoided("A Room that mends\nwhat stands; so many windows") == ["room", "mends", "stands", "so many"]
    assert not avoided("headroom, amendments, understand, standard, untold")


def test_glossary_is_sorted_with_one_sentence_each():
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", (DOCS / "glossary.md").read_text(), flags=re.MULTILINE)
    rows = [row for row in rows if row[0] not in ("word", "---")]
    assert len(rows) >= 30
    words = [word for word, _ in rows]
    assert words == sorted(words)
    for word, meaning in rows:
        assert meaning.endswith(".") and ". " not in meaning, word
