"""Writes the files of a linked build: which names each imports from which other, and what is left out of the files that
are not linked."""

import ast
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from stonechat.errors import ConfigError

from .link_names import is_constant, names_bound

# Built-in functions that a linked module makes its own: a board looks through its built-ins one by one, 8 us each time.
_LOOKED_UP = ("int", "isinstance", "len", "max", "min", "range", "type")


def texts_of(
    entry: str,
    files: dict[str, list[ast.stmt]],
    imported: dict[str, tuple[str, str]],
    public: set[str],
    late: Iterable[str] = (),
) -> dict[str, str]:
    """files: statements by file; imported: what they take from elsewhere; late: files that a function of the entry
    imports where it has `from FILE import *` -> texts. Constants are copied into each
    file that uses them, as mpy-cross stores none; everything else is imported from the file that has it."""
    constants = {names_bound(one)[0]: one for body in files.values() for one in body if is_constant(one)}
    where = {name: file for file, body in files.items() for one in body for name in names_bound(one)}
    made = {}
    for file, body in files.items():
        used = set().union(*[_used_globals(one) for one in body]) | (public if file == entry else set())
        copied: list[ast.stmt] = []
        waiting = sorted(used & {*constants})
        while waiting:
            name = waiting.pop(0)
            if where[name] != file and constants[name] not in copied:
                copied.insert(0, constants[name])
                waiting += sorted(
                    {one.id for one in ast.walk(constants[name]) if isinstance(one, ast.Name)} & {*constants}
                )
        depth = "." * len(Path(file).parent.parts)
        lines = []
        for module in sorted({module for module, _ in imported.values()}):
            pairs = sorted((name, real) for name, (source, real) in imported.items() if source == module)
            names = [real if name == real else f"{real} as {name}" for name, real in pairs if name in used]
            module = depth + module if module.startswith(".") else module
            if names:
                lines += (
                    [f"from {module} import {', '.join(names)}"] if module else [f"import {name}" for name in names]
                )
        for other in [other for other in files if other != file]:
            names = sorted(used & {name for name in where if where[name] == other and name not in constants})
            if file == entry and other in late:
                _load_late(body, other, depth, names)
            elif file == entry:
                tidy = next(name for name, (_, real) in imported.items() if real == "tidy")
                lines += [
                    f"{tidy}()",
                    f"from {depth}.{other} import {', '.join(names)}" if names else f"from {depth}. import {other}",
                ]
            elif names and other == entry:
                raise ConfigError(f"link: {file} uses {', '.join(names)} of {entry}, which loads it")
            elif names:
                lines.append(f"from {depth}.{other} import {', '.join(names)}")
        uses = Counter(node.id for one in body for node in ast.walk(one) if isinstance(node, ast.Name))
        lines += [f"{name} = {name}" for name in _LOOKED_UP if uses[name] > 2 and name in used]
        statements = ast.Module([*copied, *body], [])
        made[file] = "\n".join([*lines, ast.unparse(ast.fix_missing_locations(statements)), ""])
    return made


def _load_late(body: list[ast.stmt], file: str, depth: str, names: list[str]) -> None:
    functions = [node for one in body for node in ast.walk(one) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for node in [one for one in ast.walk(function) if isinstance(one, ast.ImportFrom) and one.module == file]:
            node.names = [ast.alias(name) for name in names]
            node.level = len(depth) + 1
            function.body.insert(0, ast.Global(names))


def _used_globals(node: ast.AST, local: frozenset[str] = frozenset()) -> set[str]:
    """The names below `node` that no function around them binds."""
    if isinstance(node, ast.Name):
        return {node.id} - local
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        inside = [one for one in ast.walk(node) if one is not node]
        local |= {one.arg for one in inside if isinstance(one, ast.arg)}
        local |= {one.id for one in inside if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
        local |= {one.asname or one.name for one in inside if isinstance(one, ast.alias)}
        local -= {name for one in inside if isinstance(one, ast.Global) for name in one.names}
    if isinstance(node, ast.ClassDef):  # what it binds is an attribute
        bound = local.union(*[names_bound(one) for one in node.body])
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        within = [_used_globals(one, local if isinstance(one, functions) else bound) for one in node.body]
        return set().union(*within, *[_used_globals(one, local) for one in node.bases])
    return set().union(*[_used_globals(one, local) for one in ast.iter_child_nodes(node)])


def without_unused(source: str, texts: Iterable[str]) -> str:
    """The text of compat.py or errors.py without the functions, errors and names of imports that neither it nor the
    modules `texts` use."""
    tree = ast.parse(source)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for node in [node for text in texts for node in ast.walk(ast.parse(text))]:
        used |= {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            node.names = [one for one in node.names if (one.asname or one.name) in {*used, "*"}] or node.names
        if isinstance(node, (ast.Module, ast.ExceptHandler)):
            node.body = [one for one in node.body if {*_made_by(one)} <= used] or node.body
    return ast.unparse(tree)


def _made_by(statement: ast.stmt) -> list[str]:
    """The name of a function, and that of what a call makes."""
    if isinstance(statement, ast.FunctionDef):
        return [statement.name]
    call = isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)
    return names_bound(statement) if call else []
