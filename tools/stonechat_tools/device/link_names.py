"""What link.py does to the names of a module: short ones for what is private, A, B, C for arguments, and one name for
the attributes of several classes. Each class here rewrites a syntax tree."""

import ast
import itertools
import keyword
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TypeGuard

_NAMED = ("id", "attr", "name", "arg")  # fields of syntax nodes that hold a name
# Names that every firmware has, by which a .mpy file refers to them in one or two bytes (MicroPython's
# py/makeqstrdata.py, static_qstr_list; part of the format of version 6): they take neither space in it nor heap.
_ERRORS = (  # noqa: SIM905 - a table of words
    "ArithmeticError AssertionError AttributeError EOFError Ellipsis GeneratorExit IndentationError IndexError "
    "KeyError KeyboardInterrupt LookupError NameError NoneType NotImplementedError OverflowError RuntimeError "
    "StopIteration SyntaxError SystemExit TypeError ZeroDivisionError"
).split()
_WORDS = (  # noqa: SIM905
    "abs all any append args bool builtins bytecode callable chr classmethod clear const copy count dict dir divmod "
    "endswith eval exec extend find format from_bytes get getattr globals hasattr hash id index insert isalpha isdigit "
    "islower isspace issubclass isupper items iter join key keys list little locals lower lstrip main map micropython "
    "next object ord pop popitem pow range remove replace repr reverse rfind rindex round rsplit rstrip sep set "
    "setdefault sort split startswith staticmethod step str strip sum super throw to_bytes tuple type update upper "
    "value values zip"
).split()


def private(name: str) -> str:
    return f"_{name}_"


def private_names(source: str) -> set[str]:
    """The names and attributes of a text that begin with one underscore."""
    found = {getattr(node, field, None) for node in ast.walk(ast.parse(source)) for field in _NAMED}
    return {name for name in found if is_private(name)}


def attributes(body: Iterable[ast.stmt]) -> set[str]:
    """The names that are, or may be, attributes: of objects and modules, methods, what a class binds, texts."""
    found: set[str] = set()
    for node in [node for statement in body for node in ast.walk(statement)]:
        found |= {name for name in (getattr(node, "attr", None), getattr(node, "value", None)) if isinstance(name, str)}
        if isinstance(node, ast.ClassDef):
            found |= {name for statement in node.body for name in names_bound(statement)}
    return found


def variables(body: Iterable[ast.stmt]) -> set[str]:
    """The names that are, or may be, variables: of modules and functions, arguments, imports."""
    found: set[str] = set()
    for node in [node for statement in body for node in ast.walk(statement)]:
        fields = [getattr(node, field, None) for field in ("id", "name", "arg", "asname")]
        found |= {name for name in fields if isinstance(name, str)}
        found |= {name for name in getattr(node, "names", ()) if isinstance(name, str)}
    return found


def keywords_of(source: str) -> set[str]:
    """The arguments that the calls of a text name."""
    return {node.arg for node in ast.walk(ast.parse(source)) if isinstance(node, ast.keyword) and node.arg}


def used_names(source: str) -> set[str]:
    """The attributes, functions, arguments and keywords of a text."""
    nodes = list(ast.walk(ast.parse(source)))
    return {getattr(node, field) for node in nodes for field in ("attr", "name", "arg") if getattr(node, field, None)}


def names_bound(statement: ast.stmt) -> list[str]:
    """The names that a statement of a module binds in it, also those in the blocks of an `if` or a `try`."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    blocks = [getattr(statement, field, []) for field in ("body", "orelse", "finalbody")]
    blocks += [handler.body for handler in getattr(statement, "handlers", [])]
    found = [name for block in blocks for inner in block for name in names_bound(inner)]
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    nodes = [node for target in targets if target is not None for node in ast.walk(target)]
    return found + [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _by_position(signature: ast.arguments) -> None:
    """Make arguments that only a keyword gives ordinary ones, those without a default first."""
    pairs = [*zip(signature.kwonlyargs, signature.kw_defaults, strict=True)]
    needed = [argument for argument, default in pairs if default is None]
    if signature.vararg or (needed and signature.defaults):
        return
    signature.args += needed + [argument for argument, default in pairs if default is not None]
    signature.defaults += [default for _, default in pairs if default is not None]
    signature.kwonlyargs, signature.kw_defaults = [], []


def _has_self(statement: ast.stmt) -> TypeGuard[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Whether a statement of a class defines a method whose first argument is the object."""
    if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)) or not statement.args.args:
        return False
    return {getattr(one, "id", "") for one in statement.decorator_list} <= {"property"}


def is_constant(statement: ast.stmt) -> bool:
    """NAME = const(...)"""
    call = statement.value if isinstance(statement, ast.Assign) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "const"


def is_private(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and name[:1] == "_" and name[1:2] not in ("", "_")


def _short_names() -> Iterator[str]:
    yield from string.ascii_lowercase  # arguments have capital ones
    pairs = itertools.product(string.ascii_lowercase, string.ascii_letters)
    yield from (a + b for a, b in pairs if not keyword.iskeyword(a + b))


class Pool:
    """Short names for the private ones of several modules, in which one name is never that of two attributes or of two
    variables: their classes may derive from one another's. An attribute and a variable share one: a board stores it
    once. taken: those that stay as they are somewhere; words: whether methods of built-in types may lend theirs, as a
    firmware derives no classes from these modules'."""

    def __init__(self, body: Iterable[ast.stmt], taken: Iterable[str] = (), words: bool = False) -> None:
        kept = {*taken}
        body = list(body)
        table = (*_ERRORS, *(_WORDS if words else ()))
        self._free = {  # by whether it is an attribute
            True: self._those(table, kept | attributes(body)),
            False: self._those(table, kept | variables(body)),
        }
        self._names: dict[tuple[bool, str], str] = {}

    @staticmethod
    def _those(table: tuple[str, ...], kept: set[str]) -> Iterator[str]:
        return (name for name in itertools.chain(table, _short_names()) if name not in kept)

    def short(self, name: str, attribute: bool) -> str:
        if (attribute, name) not in self._names:
            self._names[attribute, name] = next(self._free[attribute])
        return self._names[attribute, name]


class Shortened(ast.NodeTransformer):
    """Gives each private name of `body` a short one of the pool, but for those in `kept`; also a text that is one, as
    setattr() takes it. Constants keep theirs: mpy-cross stores no private constant."""

    def __init__(self, body: list[ast.stmt], kept: set[str], pool: Pool, texts: Iterable[str] = ()) -> None:
        constants = {name for statement in body if is_constant(statement) for name in names_bound(statement)}
        self._kept = kept | constants
        self._pool = pool
        self._texts = {*texts}
        self._of_class: set[str] = set()  # what the class around binds, outside of its methods

    def _short(self, name: str, attribute: bool) -> str:
        return self._pool.short(name, attribute) if is_private(name) and name not in self._kept else name

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in _NAMED:
            name = getattr(node, field, None)
            if isinstance(name, str):
                setattr(node, field, self._short(name, field == "attr" or field != "arg" and name in self._of_class))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        outer = self._of_class
        node.bases = [self.visit(one) for one in node.bases]
        node.name = self._short(node.name, node.name in outer)
        self._of_class = {name for statement in node.body for name in names_bound(statement)}
        node.body = [self.visit(one) for one in node.body]
        self._of_class = outer
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.name = self._short(node.name, node.name in self._of_class)
        node.decorator_list = [self.visit(one) for one in node.decorator_list]
        outer = self._of_class
        node.args.defaults = [self.visit(one) for one in node.args.defaults]
        node.args.kw_defaults = [one and self.visit(one) for one in node.args.kw_defaults]
        self._of_class = set()
        for argument in [one for one in ast.walk(node.args) if isinstance(one, ast.arg)]:
            argument.arg = self._short(argument.arg, False)
        node.body = [self.visit(one) for one in node.body]
        self._of_class = outer
        return node

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        name = node.value
        if is_private(name) and name in self._texts - self._kept:
            return ast.Constant(self._pool.short(name, True))
        return node

    def visit_Global(self, node: ast.Global) -> ast.Global:
        own = {name for name in node.names if is_private(name)} - self._kept
        node.names = [self._pool.short(name, False) if name in own else name for name in node.names]
        return node


class Inner(ast.NodeTransformer):
    """Makes `names` (of INNER) private, whatever they name."""

    def __init__(self, names: set[str]) -> None:
        self._inner = names

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in _NAMED:
            if getattr(node, field, None) in self._inner:
                setattr(node, field, private(getattr(node, field)))
        return node


class Positions(ast.NodeTransformer):
    """Gives by their positions what calls of the module's own functions and classes give by keywords: a board stores
    each keyword, and the name of each argument that has one. kept: functions whose arguments keep their names."""

    def __init__(self, body: list[ast.stmt], kept: set[str]) -> None:
        self._signatures: dict[str, tuple[list[str], list[ast.expr | None]]] = {}
        for statement in body:
            own = 0
            made: ast.stmt | None = statement
            if isinstance(statement, ast.ClassDef):
                made = next((one for one in statement.body if getattr(one, "name", "") == "__init__"), None)
                own = 1  # self
            name = getattr(statement, "name", "")
            if isinstance(made, (ast.FunctionDef, ast.AsyncFunctionDef)) and name not in kept:
                signature = made.args
                _by_position(signature)
                if not signature.vararg and not signature.kwonlyargs:
                    names = [argument.arg for argument in signature.args]
                    defaults = [None] * (len(names) - len(signature.defaults)) + signature.defaults
                    self._signatures[name] = names[own:], defaults[own:]

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        given = {one.arg or "": one.value for one in node.keywords}
        names, defaults = self._signatures.get(getattr(node.func, "id", ""), ([], []))
        if not given or not {*given} <= {*names} or any(isinstance(one, ast.Starred) for one in node.args):
            return node
        last = max(names.index(name) for name in given)
        rest = [*zip(names, defaults, strict=True)][len(node.args) : last + 1]
        values = [given.get(name, default) for name, default in rest]
        plain = [
            isinstance(value, ast.Constant) for (name, _), value in zip(rest, values, strict=True) if name not in given
        ]
        if all(plain):
            node.args += [value for value in values if value is not None]
            node.keywords = []
        return node


class Arguments(ast.NodeTransformer):
    """Gives the arguments of functions the names A, B, C ..., but for those that a call names, and those of `kept`
    functions: a board stores the name of every argument, once for each name. And what only a keyword may give may be
    given by its position: a board makes a dictionary for the defaults of the former."""

    def __init__(self, body: list[ast.stmt], kept: set[str], named: Iterable[str] = ()) -> None:
        nodes = [node for statement in body for node in ast.walk(statement)]
        self._named = {node.arg for node in nodes if isinstance(node, ast.keyword)} | {*named}
        self._named |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler)}
        self._named |= {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
        functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        inner = [one for node in functions for one in ast.walk(node) if one is not node]
        self._named |= {one.name for one in inner if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))}
        self._taken = {node.id for node in nodes if isinstance(node, ast.Name)}
        self._kept = kept
        self._scopes: list[dict[str, str]] = []

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> ast.AST:
        signature = node.args
        defaults = [*signature.defaults, *[default for default in signature.kw_defaults if default is not None]]
        for default in defaults:
            self.visit(default)
        names: dict[str, str] = {}
        if getattr(node, "name", "") not in self._kept:
            _by_position(signature)
            free = (a for a in string.ascii_uppercase if a not in self._taken and a not in self._used())
            for argument in [*signature.posonlyargs, *signature.args]:
                if argument.arg not in self._named:
                    names[argument.arg] = argument.arg = next(free)
        for argument in [*signature.posonlyargs, *signature.args, *signature.kwonlyargs]:
            names.setdefault(argument.arg, argument.arg)  # it hides an outer one
        self._scopes.append(names)
        body = node.body if isinstance(node.body, list) else [node.body]
        for statement in body:
            self.visit(statement)
        self._scopes.pop()
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function

    def _used(self) -> set[str]:
        return {new for scope in self._scopes for new in scope.values()}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        for scope in reversed(self._scopes):
            if node.id in scope:
                node.id = scope[node.id]
                break
        return node


class OwnNames(ast.NodeTransformer):
    """Gives the private attributes and methods that a class alone uses, by its `self`, names that other classes give to
    theirs: a board stores a name once, and refers to the 128 most used ones by one byte. kept: names to leave alone.
    Classes that derive from one another are one family, in which each name is another."""

    def __init__(self, body: list[ast.stmt], kept: set[str]) -> None:
        self._uses: Counter[tuple[str, str]] = Counter()  # (family, name)
        self._kept = kept
        self._elsewhere = {*kept}  # used otherwise
        self._selves: list[tuple[str, str]] = []  # (family, name of self) of the method around
        self._names: dict[tuple[str, str], str] = {}
        classes = {one.name: one for one in body if isinstance(one, ast.ClassDef)}
        self._family = {name: name for name in classes}
        for name, node in classes.items():
            for base in node.bases:
                first, second = self._family[name], self._family.get(getattr(base, "id", ""))
                for other in classes if second else ():
                    self._family[other] = str(second) if self._family[other] == first else self._family[other]
        for statement in body:
            self.visit(statement)
        families: dict[str, set[str]] = {}
        for family, name in self._uses:
            families.setdefault(name, set()).add(family)
        free = self._of_module(body)
        taken: Counter[str] = Counter()
        for (family, name), _ in self._uses.most_common():
            if name not in self._elsewhere and len(families[name]) == 1:
                number = taken[family]
                self._names[family, name] = free[number] if number < len(free) else f"_own_{number}_"
                taken[family] += 1

    def _of_module(self, body: list[ast.stmt]) -> list[str]:
        """The names of arguments, and of the private functions and classes of the module, most used first, that
        attributes may have too: no attribute has it yet, and no class refers to it outside of its methods, where
        its own names hide it."""
        nodes = [node for statement in body for node in ast.walk(statement)]
        used = Counter(node.id for node in nodes if isinstance(node, ast.Name))
        classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
        hidden = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        for statement in [one for node in classes for one in node.body]:
            parts: list[ast.AST] = [statement]
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                parts = [statement.args, *statement.decorator_list]
            hidden |= {getattr(statement, "name", "")}
            hidden |= {node.id for part in parts for node in ast.walk(part) if isinstance(node, ast.Name)}
        names = [one.name for one in body if isinstance(one, (ast.FunctionDef, ast.ClassDef)) and is_private(one.name)]
        letters = {node.arg for node in nodes if isinstance(node, ast.arg) and node.arg in string.ascii_uppercase}
        functions = sorted({*names} - hidden - self._kept, key=lambda name: (-used[name], name))
        return sorted(letters - hidden) + functions

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        for statement in node.body:
            if node.name in self._family and _has_self(statement):
                self._selves.append((self._family[node.name], statement.args.args[0].arg))
                statement.name = self._own(statement.name, self._family[node.name])
                super().generic_visit(statement)
                self._selves.pop()
            else:
                self.visit(statement)
        for part in [*node.bases, *node.decorator_list]:
            self.visit(part)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.Attribute:
        name = getattr(node.value, "id", "")
        if self._selves and name == self._selves[-1][1]:
            node.attr = self._own(node.attr, self._selves[-1][0])
        elif name in self._family and isinstance(node.ctx, ast.Store):  # what a start drops of a class
            node.attr = self._own(node.attr, self._family[name])
        else:
            self._elsewhere.add(node.attr)
            self.visit(node.value)
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        fields = [getattr(node, field, None) for field in (*_NAMED, "value")]
        self._elsewhere |= {name for name in fields if isinstance(name, str)}
        return super().generic_visit(node)

    def _own(self, name: str, family: str) -> str:
        if not is_private(name):
            return name
        self._uses[family, name] += 1
        return self._names.get((family, name), name)


class Globals(ast.NodeTransformer):
    """Makes the functions, classes and variables `names` of the module private."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(private(node.id), node.ctx) if node.id in self.names else node

    def _definition(self, node: ast.stmt) -> ast.stmt:
        self.generic_visit(node)
        name = getattr(node, "name", "")
        if name in self.names:
            setattr(node, "name", private(name))  # noqa: B010
        return node

    visit_FunctionDef = visit_ClassDef = _definition


class Constants(ast.NodeTransformer):
    """Makes the constants among `body` private."""

    def __init__(self, body: list[ast.stmt]) -> None:
        self.public = {name for statement in body if is_constant(statement) for name in names_bound(statement)}
        self.public = {name for name in self.public if name[0] != "_"}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(private(node.id), node.ctx) if node.id in self.public else node
