"""Imports go one way: a room imports rooms before it in the table, and nobody imports `plywise` itself."""

import ast
from pathlib import Path

import plywise

SOURCE = Path(plywise.__file__).parent

ORDER = (
    ("errors",),
    ("registry.names",),
    ("_util",),
    ("numerics",),
    ("engine.maps",),
    ("engine.explain", "engine.health", "engine.sharding"),
    ("engine.call", "engine.finite", "engine.passes"),
    ("engine.answers", "engine.sites"),
    ("engine.selection",),
    ("engine.contract",),
    ("engine.processes",),
    ("engine.capture",),
    ("engine.readers", "engine.statistics"),
    ("engine.coordinates", "engine.reports"),
    ("engine",),
    ("loggers",),
    ("rules", "optim", "nn", "schedules"),
    ("losses", "init"),
    ("data",),
    ("local.cutting",),
    ("local",),
    ("pipeline",),
    ("registry",),
    ("training", "testing"),
    ("arena.space", "arena.task"),
    ("arena.workload", "arena.given", "arena.arguments"),
    ("arena.method",),
    ("arena.methods", "arena.workloads"),
    ("arena.scoring",),
    ("arena.diagnostics",),
    ("arena.run",),
    ("arena.reports",),
    ("arena.demo", "arena.reproductions", "arena.public"),
    ("cli",),
)
"""Rooms from the lowest to the highest: a room may import itself and those of the lines before its own."""

LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

FACES = {"rule", "memory", "ply", "layers", "card", "health", "local.session"}
"""Old addresses: they import what has moved, and nobody imports them."""

USERS = "testing.contract"
"""Tests that ship: they see plywise as its users do."""

TOP = {"", "__main__"}
"""The package itself, which shows what the rooms hold."""


def find_room(module):
    """The longest entry of the table that a module is in, or None."""
    parts = module.split(".")
    heads = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((head for head in heads if head in LEVELS), None)


def find_modules(source):
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def find_imports(path, modules):
    """Line number and module, below `plywise`, of each import, in functions and for type checks, too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports from plywise in full"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("plywise.") in modules else node.module for name in whole]
        else:
            continue
        for name in names:
            if name == "plywise" or name.startswith("plywise."):
                yield node.lineno, name.removeprefix("plywise").removeprefix(".")


def find_wrong_lines(source):
    modules = {name for name, _ in find_modules(source)}
    for module, path in find_modules(source):
        if module in TOP or module in FACES:
            continue
        room = find_room(module)
        if room is None:
            if path.name != "__init__.py":
                yield f"{path}: {module} is in no room of the table"
            continue
        for line, imported in find_imports(path, modules):
            where = f"{path}:{line}: {module} imports plywise.{imported}"
            if imported in TOP and module.startswith(USERS):
                continue
            if imported in TOP or imported in FACES:
                yield f"{where}, which is for users"
            elif find_room(imported) is None:
                yield f"{where}, which is in no room of the table"
            elif find_room(imported) != room and LEVELS[find_room(imported)] >= LEVELS[room]:
                yield f"{where}: {find_room(imported)} is not below {room}"


def find_circle(source):
    """Modules that import one another in a ring, later and for type checks, too; empty if there are none.

    A package may load its own parts.
    """
    modules = dict(find_modules(source))
    graph = {
        name: {
            imported
            for _, imported in find_imports(path, modules)
            if imported in modules and imported not in TOP and not imported.startswith(f"{name}.")
        }
        - {name}
        for name, path in modules.items()
        if name not in TOP and not name.startswith(USERS)
    }
    done = set()

    def walk(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        ring = next(filter(None, (walk(other, [*path, name]) for other in sorted(graph.get(name, ())))), [])
        done.add(name)
        return ring

    return next(filter(None, (walk(name, []) for name in sorted(graph))), [])


def test_imports_go_one_way():
    assert not list(find_wrong_lines(SOURCE))


def test_no_modules_import_each_other_in_a_circle():
    assert find_circle(SOURCE) == []


def test_few_modules_lie_flat():
    flat = {path.stem for path in SOURCE.glob("*.py")} - FACES
    assert len(flat) <= 6, flat


def test_a_wrong_import_is_named_with_its_line(tmp_path):
    for room in ("numerics", "engine", "local"):
        (tmp_path / room).mkdir()
    (tmp_path / "__init__.py").touch()
    (tmp_path / "numerics" / "up.py").write_text("import torch\n\nfrom plywise.engine import call\n")
    (tmp_path / "engine" / "call.py").write_text("def later():\n    import plywise\n")
    (tmp_path / "local" / "one.py").write_text("from plywise.local import two\n")
    (tmp_path / "local" / "two.py").write_text("import plywise.local.one\n")
    up, whole = sorted(find_wrong_lines(tmp_path), key=lambda line: "up.py" not in line)
    assert "up.py:3: numerics.up imports plywise.engine.call: engine.call is not below numerics" in up
    assert "call.py:2: engine.call imports plywise., which is for users" in whole
    assert find_circle(tmp_path) == ["local.one", "local.two", "local.one"]


def test_files_and_functions_are_short():
    """At most 400 lines a file and 40 a function, not counting its docstring."""
    too_long = []
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text()
        if (count := text.count("\n")) > 400:
            too_long.append(f"{path.name}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and count_lines(node) > 40:
                too_long.append(f"{path.name}, {node.name}: {count_lines(node)} lines")
    assert too_long == []


def count_lines(function):
    """The lines of a function without its docstring."""
    first = function.body[0] if ast.get_docstring(function) else None
    of_docstring = first.end_lineno - first.lineno + 1 if first else 0
    return function.end_lineno - function.lineno + 1 - of_docstring
