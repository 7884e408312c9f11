"""Links several modules of the agent into one, which saves a board the .mpy of repeated names and imports.

The sources of the modules follow one another, imported ones first; imports between them are removed, `module.name`
becomes `name`, and constants get the underscore by which mpy-cross knows that no other module reads them. What would
become ambiguous (two modules that define the same name, a local variable that hides one) is refused. Private names that
no other module uses become short ones, and so do arguments that no call names.
"""

import ast
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from stonechat.errors import ConfigError

from .link_files import texts_of
from .link_names import (
    Arguments,
    Constants,
    Globals,
    Inner,
    OwnNames,
    Pool,
    Positions,
    Shortened,
    is_private,
    keywords_of,
    names_bound,
    private,
    private_names,
    used_names,
)
from .link_start import Step, drop_start, load_late

# Attributes and methods that only the linked modules use: they become private, except those that a module which stays
# apart uses too (`--with`). A test looks for other uses of them.
INNER = {
    "macs",
    "version",
    "attach",
    "switch_off",
    "was_normal",
    "restart",
    "announce",
    "ack_topic",
    "allows",
    "carry_out",
    "command_topic",
    "interval_ms",
    "maintenance_until_s",
    "max_segments",
    "mute_until_s",
    "on_renewal",
    "on_switch",
    "refuse",
    "report_now",
    "resend_ms",
    "spend",
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
    "held_back",
    "unsaved",
    "channel_names",
    "decided",
}
PUBLIC = {"load_model"}  # what a firmware may take from the linked module beside what its entry defines


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
    are; dropped: methods to leave out, "Class.method", unless an optional module uses them; users: the texts of
    optional modules, which stay files of their own: the attributes and arguments that they use stay as they are;
    pool: for the short names -> the text of a module that replaces `entry` and holds them all. Raises ConfigError where
    names collide."""
    return link_parts(entry, order, sources, {}, kept, dropped, users, pool)[entry]


def link_parts(
    entry: str,
    order: list[str],
    sources: dict[str, str],
    parts: dict[str, set[str]],
    kept: Iterable[str] = (),
    dropped: Iterable[str] = (),
    users: Iterable[str] = (),
    pool: Pool | None = None,
    steps: Iterable[Step] = (),
    late: dict[str, tuple[str, str]] | None = None,
) -> dict[str, str]:
    """As link(), in several files -> their texts. parts: for each file beside `entry` its modules, which import only
    those of its own and of the parts before it; `entry` loads the parts in order, and frees what each load has left,
    so that the next one finds its memory. steps: what the start drops of itself; late: parts that it loads on its way
    (link_start.py)."""
    users = list(users)
    inner_names = INNER - set().union(*map(used_names, users))
    imported: dict[
        str, tuple[str, str]
    ] = {}  # name -> (statement's module, seen from the package's folder; name there)
    owners: dict[str, str] = {}
    body: list[ast.stmt] = []
    homes: list[str] = []  # of each statement: the file
    for path in order:
        home = next((name for name, inside in parts.items() if path in inside), entry)
        linker = _Linker(home, path, set(order), imported)
        for statement in ast.parse(sources[path]).body:
            for name in names_bound(statement):
                if owners.setdefault(name, path) != path:
                    raise ConfigError(f"link: {name} is in {owners[name]} and in {path}")
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                if isinstance(statement, ast.ClassDef):
                    gone = {name.rpartition(".")[2] for name in dropped if name.partition(".")[0] == statement.name}
                    gone -= set().union(*map(used_names, users))
                    statement.body = [one for one in statement.body if getattr(one, "name", "") not in gone]
                made = linker.visit(statement)
                body += [made] if made is not None else []
                homes += [home] if made is not None else []
    for name, (module, _) in imported.items():
        if name in owners:
            raise ConfigError(f"link: {name} is in {owners[name]} and comes from {module or 'outside'}")
    body = [Inner(inner_names).visit(statement) for statement in body]
    constants = Constants(body)
    for name in constants.public:
        if private(name) in owners:
            raise ConfigError(f"link: {name} and {private(name)}")
    body = [constants.visit(statement) for statement in body]
    own = {name for statement in body for name in names_bound(statement)} - set(_defined_in(sources[entry])) - PUBLIC
    inner = Globals({name for name in own if not is_private(name)} - _mentioned(body))
    body = [Positions(body, {*_defined_in(sources[entry]), *PUBLIC}).visit(statement) for statement in body]
    arguments = Arguments(body, {*_defined_in(sources[entry]), *PUBLIC}, set().union(*map(keywords_of, users)))
    body = [inner.visit(arguments.visit(statement)) for statement in body]
    become = inner_names | inner.names

    def renamed(name: str) -> str:
        return private(name) if name in become else name

    if steps:
        drop_start(entry, body, homes, steps, renamed, PUBLIC, bool(late))
    load_late(body, late or {}, renamed)
    shortened = Shortened(body, {*kept, *imported}, pool or Pool(body, {*kept, *imported}, True))
    own_names = OwnNames(body, {*kept}.union(*map(private_names, users)))
    body = [shortened.visit(own_names.visit(statement)) for statement in body]
    imported.pop("const", None)
    files = {name: [one for one, home in zip(body, homes, strict=True) if home == name] for name in (*parts, entry)}
    return texts_of(entry, files, imported, PUBLIC, late or ())


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
    return [name for statement in ast.parse(source).body for name in names_bound(statement)]


def _mentioned(body: list[ast.stmt]) -> set[str]:
    """Names that are more than a variable of the module: bound or imported in a function, an argument, a keyword."""
    found: set[str] = set()
    for node in [node for statement in body for node in ast.walk(statement)]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside = [one for one in ast.walk(node) if one is not node]
            found |= {one.id for one in inside if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
            found |= {one.name for one in inside if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))}
        elif isinstance(node, ast.ClassDef):
            found |= {name for statement in node.body for name in names_bound(statement)}
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
        tree = Arguments(tree.body, set(), set().union(*map(keywords_of, users))).visit(tree)
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom):
            statement.names = [alias for alias in statement.names if alias.name != "const"]
    tree.body = [one for one in tree.body if not isinstance(one, ast.ImportFrom) or one.names]
    pool = pool or Pool(tree.body, kept)
    if arguments:
        tree = OwnNames(tree.body, {*kept}).visit(tree)
    return ast.unparse(Shortened(tree.body, {*kept}, pool, private_names(source)).visit(tree))


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
                module = "." + "/".join([*folder.parts, node.module or ""]).strip("/").replace("/", ".")
            if self._locals:
                kept.append(alias)
            else:
                self._note(alias.asname or alias.name, module, alias.name)
        if not kept:
            return ast.Pass() if self._locals else None
        dots = len(Path(self._entry).parent.parts) + 1 if node.level else 0
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
