"""Lets a linked build drop what only its start uses, step by step: what comes later in the start finds its memory, and
a board that has started keeps no code of it."""

import ast
from collections.abc import Callable, Iterable

from stonechat.errors import ConfigError

from .link_names import names_bound, private

_LOOP_FROM = 6  # with fewer, a loop takes more of the .mpy
Step = tuple[str, str, tuple[str, ...]]
# The entry's start(): what is left of it when it has succeeded is its Watch.
_ONCE = """
def start(*args, **keys):
    global _start_
    if callable(_start_):
        _start_ = _start_(*args, **keys)
    return _start_
"""
# The same where a step comes before something that may fail: behind a start that failed, all files are loaded again.
_AGAIN = """
def start(*args, **keys):
    global _start_
    call = _start_
    if not call:
        from sys import modules
        for name in {files!r}:
            modules.pop("stonechat." + name, None)
        call = __import__({last!r}).{path}.start
    if callable(call):
        _start_ = None
        _start_ = call(*args, **keys)
    return _start_
"""


def drop_start(
    entry: str,
    body: list[ast.stmt],
    homes: list[str],
    steps: Iterable[Step],
    renamed: Callable[[str], str],
    public: Iterable[str],
    again: bool,
) -> None:
    """Changes body and homes (the file of each statement). steps: (function, call, names): behind the statement of
    `function` ("Class.method" or a function, also one in another) that calls `call`, the methods and functions `names`
    become None; before it, where it returns. renamed: what a name has become; public: what the entry has of other
    files for the firmware; again: whether a start can fail behind a step: then it also collects there, as small pieces
    that come before the next collection would break up the long gaps. Raises ConfigError for a name that is not there.
    """
    files = dict.fromkeys(homes)
    for number, (function, call, names) in enumerate(steps):
        block = _function(body, [renamed(part) for part in function.split(".")])
        inserted: list[ast.stmt] = []
        outer: list[str] = []
        for home in files:
            code, functions = _dropping(
                body,
                homes,
                home,
                [[renamed(part) for part in one.split(".")] for one in names],
                public if home == entry else (),
            )
            if not code:
                continue
            if home == entry:
                inserted += code
                outer += functions
                continue
            own = f"_drop_{number}_{home.replace('/', '_')}"
            outer.append(own)
            declared = [ast.Global([own, *functions])]
            made = ast.parse(f"def {own}(): pass").body[0]
            assert isinstance(made, ast.FunctionDef)
            made.body = [*declared, *code, *_none([ast.Name(own, ast.Store())])]
            body.append(made)
            homes.append(home)
            inserted += [*ast.parse(f"{own}()").body, *_none([ast.Name(own, ast.Store())])]
        if again:
            inserted += ast.parse("tidy()").body
        _insert(block, renamed(call), inserted)
        block.insert(0, ast.Global(outer)) if outer else None
    start = next(one for one, home in zip(body, homes, strict=True) if home == entry and names_bound(one) == ["start"])
    assert isinstance(start, ast.FunctionDef)
    start.name = private("start")
    path = entry.replace("/", ".")
    names = tuple(file.replace("/", ".") for file in files)
    text = _AGAIN.format(files=names, last=f"stonechat.{path}", path=path) if again else _ONCE
    body += ast.parse(text).body
    homes.append(entry)


def load_late(body: list[ast.stmt], late: dict[str, tuple[str, str]], renamed: Callable[[str], str]) -> None:
    """late: file -> (function, call): it is imported before the statement of `function` that calls `call`. Puts a
    statement there which texts_of() completes."""
    for file, (function, call) in late.items():
        block = _function(body, [renamed(part) for part in function.split(".")])
        nodes = [node for statement in block for node in ast.walk(statement)]
        blocks = [block] + [node.body for node in nodes if isinstance(node, (ast.If, ast.Try))]
        inner = [one for one in blocks if any(_calls(statement, renamed(call)) for statement in one)][-1]
        load = [ast.ImportFrom(file, [ast.alias("*")], 0), *ast.parse("tidy()").body]
        _insert(inner, renamed(call), load, before=True)


def _calls(statement: ast.stmt, name: str) -> bool:
    return any(isinstance(node, ast.Call) and getattr(node.func, "id", "") == name for node in ast.walk(statement))


def _function(body: list[ast.stmt], path: list[str]) -> list[ast.stmt]:
    """The statements of a function, by the names of what is around it."""
    for name in path:
        nodes = [node for statement in body for node in ast.walk(statement)]
        found = [node.body for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name]
        if len(found) != 1:
            raise ConfigError(f"link: {'.'.join(path)} is there {len(found)} times")
        body = found[0]
    return body


def _insert(block: list[ast.stmt], call: str, inserted: list[ast.stmt], before: bool = False) -> None:
    for at, statement in enumerate(block):
        if _calls(statement, call):
            at += not before and not isinstance(statement, ast.Return)
            block[at:at] = inserted
            return
    raise ConfigError(f"link: nothing calls {call} where a start drops its code")


def _dropping(
    body: list[ast.stmt], homes: list[str], home: str, names: list[list[str]], public: Iterable[str]
) -> tuple[list[ast.stmt], list[str]]:
    """What makes those of `names` None that the file `home` defines, and functions that it may have from another ->
    the statements, the functions among them."""
    here = [statement for statement, file in zip(body, homes, strict=True) if file == home]
    used = {node.id for statement in here for node in ast.walk(statement) if isinstance(node, ast.Name)} | {*public}
    bound = {name: statement for statement, file in zip(body, homes, strict=True) for name in names_bound(statement)}
    targets: list[ast.expr] = []
    functions = []
    for name, *method in names:
        statement = bound.get(name)
        if statement is None or method and method[0] not in [getattr(one, "name", "") for one in statement.body]:  # type: ignore[attr-defined]
            raise ConfigError(f"link: there is no {'.'.join([name, *method])} to drop")
        if not method and (statement in here or name in used):
            targets.append(ast.Name(name, ast.Store()))
            functions.append(name)
        elif method and statement in here:
            targets.append(ast.Attribute(ast.Name(name, ast.Load()), method[0], ast.Store()))
    return _shorter(_none(targets)), functions


def _none(targets: list[ast.expr]) -> list[ast.stmt]:
    return [ast.Assign([target], ast.Constant(None)) for target in targets]


def _shorter(code: list[ast.stmt]) -> list[ast.stmt]:
    """The same with one loop over the classes whose __init__ becomes None."""
    targets = [one.targets[0] for one in code if isinstance(one, ast.Assign)]
    classes = [one.value for one in targets if isinstance(one, ast.Attribute) and one.attr == "__init__"]
    if len(classes) < _LOOP_FROM:
        return code
    loop = ast.parse(f"for one in ({', '.join(map(ast.unparse, classes))}): one.__init__ = None").body
    return loop + _none([one for one in targets if getattr(one, "attr", "") != "__init__"])
