"""Links several modules of the agent into one, which saves a board the .mpy of repeated names and imports.

The sources of the modules follow one another, imported ones first; imports between them are removed, `module.name`
becomes `name`, and constants get the underscore by which mpy-cross knows that no other module reads them. What would
become ambiguous (two modules that define the same name, a local variable that hides one) is refused. Private names that
no other module uses become short ones, and so do arguments that no call names.
"""

import ast
import itertools
import keyword
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeGuard

from stonechat.errors import ConfigError

# Attributes and methods that only the linked modules use: they become private, except those that a module which stays
# apart uses too (`--with`). A test looks for other uses of them.
INNER = {
    "adaptation_q8",
    "fetch",
    "inv",
    "steps",
    "max_in_flight",
    "max_packet",
    "alarm_rules",
    "pump_due_ms",
    "due_ms",
    "held",
    "backend",
    "lead",
    "drift",
    "resets",
    "dropped",
    "status_topic",
    "mixed",
    "sections",
    "metadata",
    "adaptation",
    "unscored",
    "uptime_s",
    "elapsed_ms",
    "report_topic",
    "learn_windows",
    "resident_bytes",
    "cause",
    "centre_q8",
    "chunk",
    "clear_evidence",
    "digests",
    "distance",
    "drift_cap",
    "drift_shift",
    "encode_fields",
    "evidence",
    "excess",
    "forget",
    "golden",
    "knots",
    "learned_q8",
    "load_plan",
    "location_q8",
    "offset_q8",
    "pass_time",
    "primed",
    "reconnected",
    "rows_at_once",
    "scale_q8",
    "schema_id",
    "schema_name",
    "seen",
    "send_status",
    "tail_q8",
    "trouble",
    "worked",
    "kernels",
    "learn",
    "limit",
    "meta",
    "oversize",
    "seal",
    "shift",
    "take_up_to",
    "warmup_windows",
}
PUBLIC = {"load_model"}  # what a firmware may take from the linked module beside what its entry defines
_NAMED = ("id", "attr", "name", "arg")  # fields of syntax nodes that hold a name


def package_of(path: str, level: int) -> Path:
    """The folder that a relative import of `level` dots means in `path` ("board/hooks")."""
    folder = Path(path).parent
    for _ in range(level - 1):
        folder = folder.parent
    return folder


def in_order(paths: Iterable[str], imports: dict[str, set[str]]) -> list[str]:
    """Each module behind those that it imports. Raises ConfigError for a circle."""
    order: list[str] = []
    waiting = sorted(paths)
    while waiting:
        ready = [path for path in waiting if not imports[path] & set(waiting) - {path}]
        if not ready:
            raise ConfigError(f"modules import one another: {', '.join(waiting)}")
        order += ready
        waiting = [path for path in waiting if path not in ready]
    return order


class Pool:
    """Short names for the private ones of several modules, in which one name is never that of two things: their
    classes may derive from one another's. taken: names that stay as they are somewhere."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        kept = {*taken}
        self._free = (name for name in _short_names() if name not in kept)
        self._names: dict[str, str] = {}

    def short(self, name: str) -> str:
        if name not in self._names:
            self._names[name] = next(self._free)
        return self._names[name]


def link(
    entry: str,
    order: list[str],
    sources: dict[str, str],
    kept: Iterable[str] = (),
    dropped: Iterable[str] = (),
    users: Iterable[str] = (),
    pool: Pool | None = None,
) -> str:
    """order: modules, each behind those that it imports; sources: their texts; kept: private names to leave as they
    are; dropped: methods to leave out; users: the texts of optional modules, which stay files of their own: the
    attributes and arguments that they use stay as they are; pool: for the short names -> the text of a module that
    replaces `entry` and holds them all. Raises ConfigError where names collide."""
    users = list(users)
    inner_names = INNER - set().union(*map(_used_names, users))
    imported: dict[str, tuple[str, str]] = {}  # name -> (statement's module, name there)
    owners: dict[str, str] = {}
    body: list[ast.stmt] = []
    for path in order:
        linker = _Linker(entry, path, set(order), imported)
        for statement in ast.parse(sources[path]).body:
            for name in _defines(statement):
                if owners.setdefault(name, path) != path:
                    raise ConfigError(f"link: {name} is in {owners[name]} and in {path}")
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                if isinstance(statement, ast.ClassDef):
                    statement.body = [one for one in statement.body if getattr(one, "name", "") not in {*dropped}]
                made = linker.visit(statement)
                body += [made] if made is not None else []
    for name, (module, _) in imported.items():
        if name in owners:
            raise ConfigError(f"link: {name} is in {owners[name]} and comes from {module or 'outside'}")
    body = [_Inner(inner_names).visit(statement) for statement in body]
    constants = _Constants(body)
    for name in constants.public:
        if private(name) in owners:
            raise ConfigError(f"link: {name} and {private(name)}")
    body = [constants.visit(statement) for statement in body]
    own = {name for statement in body for name in _defines(statement)} - set(_defined_in(sources[entry])) - PUBLIC
    inner = _Globals({name for name in own if not _is_private(name)} - _mentioned(body))
    shortened = _Shortened(body, {*kept, *imported}, pool or Pool({*kept, *imported, *all_names(body)}))
    arguments = _Arguments(body, {*_defined_in(sources[entry]), *PUBLIC}, set().union(*map(_keywords, users)))
    body = [inner.visit(arguments.visit(statement)) for statement in body]
    own_names = _OwnNames(body, {*kept}.union(*map(private_names, users)))
    body = [shortened.visit(own_names.visit(statement)) for statement in body]
    imported.pop("const", None)
    lines = []
    for module in sorted({module for module, _ in imported.values()}):
        pairs = sorted((name, real) for name, (source, real) in imported.items() if source == module)
        names = [real if name == real else f"{real} as {name}" for name, real in pairs]
        lines += [f"from {module} import {', '.join(names)}"] if module else [f"import {name}" for name in names]
    return "\n".join([*lines, ast.unparse(ast.fix_missing_locations(ast.Module(body, []))), ""])


def often_used(source: str) -> list[str]:
    """The names of a text, most used first, as MicroPython's bytecode refers to them: all but local
    variables and of what the module imports at its top, which it uses first. The first 128 that a module uses take one
    byte at each use, all others two."""
    found: Counter[str] = Counter()

    def count(node: ast.AST, local: frozenset[str]) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside = [one for one in ast.walk(node) if one is not node]
            arguments = [one.arg for one in inside if isinstance(one, ast.arg)]
            stored = {one.id for one in inside if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
            outer = {name for one in inside if isinstance(one, ast.Global) for name in one.names}
            local = frozenset(({*arguments} | stored) - outer)
            found.update(arguments)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] += 2
        elif isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif isinstance(node, ast.Name) and node.id not in local:
            found[node.id] += 1
        elif isinstance(node, ast.keyword) and node.arg:
            found[node.arg] += 1
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found[node.value] += 1
        for one in ast.iter_child_nodes(node):
            count(one, local)

    tree = ast.parse(source)
    count(tree, frozenset())
    aliases = [alias for one in tree.body if isinstance(one, (ast.Import, ast.ImportFrom)) for alias in one.names]
    for name in ("const", "None", "True", "False", *[alias.asname or alias.name for alias in aliases]):
        found.pop(name, None)
    return [name for name, _ in found.most_common()]


def _defined_in(source: str) -> list[str]:
    return [name for statement in ast.parse(source).body for name in _defines(statement)]


def _mentioned(body: list[ast.stmt]) -> set[str]:
    """Names that are more than a variable of the module: bound or imported in a function, an argument, a keyword."""
    found: set[str] = set()
    for node in [node for statement in body for node in ast.walk(statement)]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside = [one for one in ast.walk(node) if one is not node]
            found |= {one.id for one in inside if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
            found |= {one.name for one in inside if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))}
        elif isinstance(node, ast.ClassDef):
            found |= {name for statement in node.body for name in _defines(statement)}
        elif isinstance(node, ast.Global):
            found |= set(node.names)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
        elif isinstance(node, (ast.arg, ast.keyword)):
            found.add(node.arg or "")
        elif isinstance(node, ast.ExceptHandler):
            found.add(node.name or "")
    return found


def shorten(
    source: str, kept: Iterable[str], arguments: bool = False, pool: Pool | None = None, users: Iterable[str] = ()
) -> str:
    """The text of a module that is not linked, with short private names except those in `kept`, from the pool.
    arguments: those of its functions too, where nobody names one in a call, in this text or in those of `users`."""
    tree = ast.parse(source)
    if arguments:
        tree = _Arguments(tree.body, set(), set().union(*map(_keywords, users))).visit(tree)
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom):
            statement.names = [alias for alias in statement.names if alias.name != "const"]
    tree.body = [one for one in tree.body if not isinstance(one, ast.ImportFrom) or one.names]
    pool = pool or Pool({*kept, *all_names(tree.body)})
    if arguments:
        tree = _OwnNames(tree.body, {*kept}).visit(tree)
    return ast.unparse(_Shortened(tree.body, {*kept}, pool, private_names(source)).visit(tree))


def all_names(body: Iterable[ast.stmt]) -> set[str]:
    """Of variables, attributes, arguments, keywords, imports and what texts spell."""
    found: set[str] = set()
    for node in [node for statement in body for node in ast.walk(statement)]:
        fields = [getattr(node, field, None) for field in (*_NAMED, "asname", "value")]
        found |= {name for name in fields if isinstance(name, str)}
        found |= {name for name in getattr(node, "names", ()) if isinstance(name, str)}
    return found


def _defines(statement: ast.stmt) -> list[str]:
    """The names that a statement of a module binds in it, also those in the blocks of an `if` or a `try`."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    blocks = [getattr(statement, field, []) for field in ("body", "orelse", "finalbody")]
    blocks += [handler.body for handler in getattr(statement, "handlers", [])]
    found = [name for block in blocks for inner in block for name in _defines(inner)]
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


def _is_constant(statement: ast.stmt) -> bool:
    """NAME = const(...)"""
    call = statement.value if isinstance(statement, ast.Assign) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "const"


def private(name: str) -> str:
    return f"_{name}_"


def private_names(source: str) -> set[str]:
    """The names and attributes of a text that begin with one underscore."""
    found = {getattr(node, field, None) for node in ast.walk(ast.parse(source)) for field in _NAMED}
    return {name for name in found if _is_private(name)}


def _used_names(source: str) -> set[str]:
    """The attributes, functions, arguments and keywords of a text."""
    nodes = list(ast.walk(ast.parse(source)))
    return {getattr(node, field) for node in nodes for field in ("attr", "name", "arg") if getattr(node, field, None)}


def _keywords(source: str) -> set[str]:
    """The arguments that the calls of a text name."""
    return {node.arg for node in ast.walk(ast.parse(source)) if isinstance(node, ast.keyword) and node.arg}


def _is_private(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and name[:1] == "_" and name[1:2] not in ("", "_")


def _short_names() -> Iterator[str]:
    yield from string.ascii_lowercase  # arguments have capital ones
    pairs = itertools.product(string.ascii_lowercase, string.ascii_letters)
    yield from (a + b for a, b in pairs if not keyword.iskeyword(a + b))


class _Shortened(ast.NodeTransformer):
    """Gives each private name of `body` a short one of the pool, but for those in `kept`; also a text that is one, as
    setattr() takes it. Constants keep theirs: mpy-cross stores no private constant."""

    def __init__(self, body: list[ast.stmt], kept: set[str], pool: Pool, texts: Iterable[str] = ()) -> None:
        constants = {name for statement in body if _is_constant(statement) for name in _defines(statement)}
        self._kept = kept | constants
        self._pool = pool
        self._texts = {*texts}

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in _NAMED:
            name = getattr(node, field, None)
            if _is_private(name) and name not in self._kept:
                setattr(node, field, self._pool.short(name))
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        name = node.value
        if _is_private(name) and name in self._texts - self._kept:
            return ast.Constant(self._pool.short(name))
        return node

    def visit_Global(self, node: ast.Global) -> ast.Global:
        own = {name for name in node.names if _is_private(name)} - self._kept
        node.names = [self._pool.short(name) if name in own else name for name in node.names]
        return node


class _Inner(ast.NodeTransformer):
    """Makes `names` (of INNER) private, whatever they name."""

    def __init__(self, names: set[str]) -> None:
        self._inner = names

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in _NAMED:
            if getattr(node, field, None) in self._inner:
                setattr(node, field, private(getattr(node, field)))
        return node


class _Arguments(ast.NodeTransformer):
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


class _OwnNames(ast.NodeTransformer):
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
        names = [one.name for one in body if isinstance(one, (ast.FunctionDef, ast.ClassDef)) and _is_private(one.name)]
        letters = {node.arg for node in nodes if isinstance(node, ast.arg) and node.arg in string.ascii_uppercase}
        functions = sorted({*names} - hidden - self._kept, key=lambda name: (-used[name], name))
        return sorted(letters - hidden) + functions

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        for statement in node.body:
            if node.name in self._family and _has_self(statement):
                self._selves.append((self._family[node.name], statement.args.args[0].arg))
                statement.name = self._own(statement.name)
                super().generic_visit(statement)
                self._selves.pop()
            else:
                self.visit(statement)
        for part in [*node.bases, *node.decorator_list]:
            self.visit(part)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.Attribute:
        if self._selves and isinstance(node.value, ast.Name) and node.value.id == self._selves[-1][1]:
            node.attr = self._own(node.attr)
        else:
            self._elsewhere.add(node.attr)
            self.visit(node.value)
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        fields = [getattr(node, field, None) for field in (*_NAMED, "value")]
        self._elsewhere |= {name for name in fields if isinstance(name, str)}
        return super().generic_visit(node)

    def _own(self, name: str) -> str:
        if not _is_private(name):
            return name
        family = self._selves[-1][0]
        self._uses[family, name] += 1
        return self._names.get((family, name), name)


class _Globals(ast.NodeTransformer):
    """Makes the functions, classes and variables `names` of the module private."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(private(node.id), node.ctx) if node.id in self._names else node

    def _definition(self, node: ast.stmt) -> ast.stmt:
        self.generic_visit(node)
        name = getattr(node, "name", "")
        if name in self._names:
            setattr(node, "name", private(name))  # noqa: B010
        return node

    visit_FunctionDef = visit_ClassDef = _definition


class _Constants(ast.NodeTransformer):
    """Makes the constants among `body` private."""

    def __init__(self, body: list[ast.stmt]) -> None:
        self.public = {name for statement in body if _is_constant(statement) for name in _defines(statement)}
        self.public = {name for name in self.public if name[0] != "_"}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(private(node.id), node.ctx) if node.id in self.public else node


class _Linker(ast.NodeTransformer):
    """Rewrites one module. `imported` collects what the modules import from elsewhere, at their top."""

    def __init__(self, entry: str, path: str, linked: set[str], imported: dict[str, tuple[str, str]]) -> None:
        self._entry = entry
        self._path = path
        self._linked = linked
        self._imported = imported
        self._modules: set[str] = set()  # names of linked modules
        self._locals: list[set[str]] = []

    def visit_Import(self, node: ast.Import) -> ast.stmt | None:
        if self._locals:
            return node
        for alias in node.names:
            self._note(alias.asname or alias.name, "", alias.name)
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt | None:
        kept = []
        module = node.module or ""
        for alias in node.names:
            if node.level:
                folder = package_of(self._path, node.level)
                path = str(folder / (node.module.replace(".", "/") if node.module else alias.name))
                if path in self._linked:
                    if not node.module:
                        self._modules.add(alias.asname or alias.name)
                    elif alias.asname:
                        raise ConfigError(f"link: {self._path} calls {alias.name} {alias.asname}")
                    continue
                ups = len(Path(self._entry).parent.parts) + 1
                module = "." * ups + "/".join([*folder.parts, node.module or ""]).strip("/").replace("/", ".")
            if self._locals:
                kept.append(alias)
            else:
                self._note(alias.asname or alias.name, module, alias.name)
        if not kept:
            return ast.Pass() if self._locals else None
        dots = len(module) - len(module.lstrip("."))
        return ast.ImportFrom(module.lstrip(".") or None, kept, dots)

    def _note(self, name: str, module: str, real: str) -> None:
        if self._imported.setdefault(name, (module, real)) != (module, real):
            raise ConfigError(f"link: {name} in {self._path} is not what it is elsewhere")

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.stmt:
        bound = {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
        self._locals.append(bound | {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)})
        node.returns = None
        self.generic_visit(node)
        self._locals.pop()
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _function

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None  # a board never looks at it
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | None:
        if node.value is None:
            return None
        self.generic_visit(node)
        return ast.Assign([node.target], node.value)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id in self._modules:
            if any(node.attr in bound for bound in self._locals):
                raise ConfigError(f"link: a variable in {self._path} hides {node.value.id}.{node.attr}")
            return ast.Name(node.attr, node.ctx)
        self.generic_visit(node)
        return node

    def visit_Name(self, node: ast.Name) -> ast.Name:
        if node.id in self._modules:
            raise ConfigError(f"link: {self._path} uses {node.id} itself")
        return node
