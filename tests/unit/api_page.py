"""docs/api.md, from the docstrings of what is importable from `sidecar`.    python -m tests.unit.api_page    writes it anew."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import sidecar

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
HEAD = """# API

What is importable from `sidecar`, from its docstrings. Written by `python -m tests.unit.api_page`; a test fails when it is stale. The guide is [library.md](library.md).

Everything is async and safe for many tasks of one event loop. Times are aware datetimes in UTC, positions and versions count from 1, `tenant` is `default` unless
given. What a method raises beyond what stands at it: `Unavailable` where Postgres, the KMS or the broker cannot be reached; nothing was decided then.
"""
GROUPS = {
    "Opening": ("open_library", "Library", "load", "Settings"),
    "The store": (
        "EventStore", "create_crypto_event_store", "CryptoEventStore", "EncryptionConfig", "DecryptionConfig", "CryptoContext", "PostgresEventStore",
        "MemoryEventStore",
    ),
    "Events and results": ("NewEvent", "Event", "Erased", "Unreadable", "Expected", "Appended", "StreamRead", "Aggregated", "Cursor", "Found"),
    "Services": (
        "CryptoShreddingService", "EncryptionPolicyService", "KeyManagementService", "PolicySpec", "Policy", "Scope", "ScopeKind", "KeyName",
    ),
    "Subscriptions": ("EventConsumer",),
}  # fmt: skip
OPERATIONS: dict[str, tuple[str, ...]] = {
    "KeyManagementService": ("get_active_key", "get_key", "rotate_key", "destroy", "clean_up", "is_forgettable"),
    "PolicySpec": (),
    "Scope": ("of_tenant",),
    "ScopeKind": (),
    "Settings": (),
}
"""Where the other methods are not an application's to call."""
BRIEF = ("Settings",)
"""Its fields are those of sidecar.yaml."""

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def errors() -> list[str]:
    found = [name for name in sidecar.__all__ if isinstance(made := getattr(sidecar, name), type) and issubclass(made, sidecar.SidecarError)]
    return sorted(found, key=lambda name: (len(getattr(sidecar, name).__mro__), name))


def ungrouped() -> set[str]:
    return set(sidecar.__all__) - {name for names in GROUPS.values() for name in names} - set(errors())


def definition(name: str) -> Definition:
    tree = ast.parse(inspect.getsource(inspect.getmodule(getattr(sidecar, name))))  # type: ignore[arg-type]
    return next(node for node in tree.body if isinstance(node, Definition) and node.name == name)


def methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for made in node.body:
        shown = isinstance(made, ast.FunctionDef | ast.AsyncFunctionDef) and not made.name.startswith("_")
        if shown and made.name in OPERATIONS.get(node.name, (made.name,)):
            yield made


def documentation(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Its own, or that of the promise that it keeps."""
    if found := ast.get_docstring(node):
        return found
    promised = {method.name: method for method in methods(definition("EventStore"))}  # type: ignore[arg-type]
    return f"As `EventStore.{node.name}`." if node.name in promised else ""


def undocumented() -> list[str]:
    out = [name for name in sidecar.__all__ if not ast.get_docstring(definition(name))]
    classes = [made for name in sidecar.__all__ if isinstance(made := definition(name), ast.ClassDef)]
    return out + [f"{made.name}.{method.name}" for made in classes for method in methods(made) if not documentation(method)]


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    given, out = node.args, []
    positional = [argument for argument in (*given.posonlyargs, *given.args) if argument.arg not in ("self", "cls")]
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    out += [_argument(argument, default) for argument, default in zip(positional, defaults, strict=True)]
    if given.kwonlyargs:
        out.append("*")
        out += [_argument(argument, default) for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    answer = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    manager = any("contextmanager" in ast.unparse(decorator) for decorator in node.decorator_list)
    how = "async with " if manager or "ContextManager" in answer else "await " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{how}{node.name}({', '.join(out)}){'' if manager else answer}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    typed = f"{argument.arg}: {ast.unparse(argument.annotation)}" if argument.annotation else argument.arg
    return typed if default is None else f"{typed} = {ast.unparse(default)}"


def fields(node: ast.ClassDef) -> Iterator[str]:
    """Of a value: name, type, default, and what stands below it."""
    for at, made in enumerate(node.body):
        below = node.body[at + 1] if at + 1 < len(node.body) else None
        said = f": {_text(below.value.value)}" if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
        if isinstance(made, ast.AnnAssign) and isinstance(made.target, ast.Name) and not made.target.id.startswith("_"):
            yield f"- `{made.target.id}: {ast.unparse(made.annotation)}{_default(made.value)}`{said}"
        elif isinstance(made, ast.Assign) and node.bases and "Enum" in ast.unparse(node.bases[0]):
            yield f"- `{ast.unparse(made)}`"


def _default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "Field"):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
        made = given.get("default") or (f"{given['default_factory']}()" if "default_factory" in given else "")
    else:
        made = ast.unparse(value) if value else ""
    return f" = {made}" if made else ""


def _text(said: object) -> str:
    return " ".join(str(said).split())


def entry(name: str) -> Iterator[str]:
    node = definition(name)
    if isinstance(node, ast.ClassDef):
        init = next((made for made in node.body if isinstance(made, ast.FunctionDef) and made.name == "__init__"), None)
        made_by_hand = init if init and name not in ("CryptoEventStore", *errors()) else None
        yield f"### `{signature(made_by_hand).replace('__init__', name).removesuffix(' -> None') if made_by_hand else name}`\n"
        yield "\n\n".join(filter(None, (ast.get_docstring(node), made_by_hand and ast.get_docstring(made_by_hand)))) + "\n"
        if name not in BRIEF:
            if listed := list(fields(node)):
                yield "\n".join(listed) + "\n"
            for method in methods(node):
                property_ = any(ast.unparse(decorator) == "property" for decorator in method.decorator_list)
                shown = f"{method.name}: {ast.unparse(method.returns)}" if property_ and method.returns else signature(method)
                yield f"#### `{shown}`\n\n{documentation(method)}\n"
    else:
        yield f"### `{signature(node)}`\n\n{ast.get_docstring(node)}\n"


def page() -> str:
    parts = [HEAD]
    for title, names in GROUPS.items():
        parts += [f"## {title}\n", *(part for name in names for part in entry(name))]
    parts.append(
        "## Errors\n\nAn error's class is the fate of what was asked; its docstring is its default message. No message holds a key or a payload.\n"
    )
    for name in errors():
        parents = " · ".join(base.__name__ for base in getattr(sidecar, name).__mro__[1:-3])
        parts.append(f"- `{name}`{f' ({parents})' if parents else ''}: {_text(ast.get_docstring(definition(name)))}")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
