"""The tidy rules: each reads a parsed module and yields what breaks it. `test_tidy` runs them, also on mutants."""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60
CORE_LINES_MAX = 3_000  # of code: docstrings, comments and blank lines are not counted
MONEY_LINES_MAX = 1_000
QUOTA_LINES_MAX = 500
DISPATCH_LINES_MAX = 800


@dataclass(frozen=True)
class Module:
    """One file of the package; `path` is relative to it, with forward slashes."""

    path: str
    text: str
    tree: ast.Module

    @property
    def floor(self) -> str:
        return self.path.split("/", 1)[0].removesuffix(".py")


@dataclass(frozen=True)
class Finding:
    rule: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}: {self.what}"


Rule = Callable[[Module], Iterator[tuple[int, str]]]
RULES: dict[str, Rule] = {}


def rule(check: Rule) -> Rule:
    RULES[check.__name__.replace("_", "-")] = check
    return check


def parse(root: Path) -> list[Module]:
    files = sorted(root.rglob("*.py"))
    texts = [(str(file.relative_to(root)), file.read_text()) for file in files]
    return [Module(path, text, ast.parse(text, path)) for path, text in texts]


def findings(modules: list[Module]) -> list[Finding]:
    found = [
        Finding(name, f"{module.path}:{line}", what)
        for module in modules
        for name, check in RULES.items()
        for line, what in check(module)
    ]
    for name, floors, lines_max in (
        ("core-length", ("domain", "policy"), CORE_LINES_MAX),
        ("money-length", ("money",), MONEY_LINES_MAX),
        ("quota-length", ("quota",), QUOTA_LINES_MAX),
        ("dispatch-length", ("dispatch",), DISPATCH_LINES_MAX),
    ):
        lines = sum(_code_lines(m) for m in modules if m.floor in floors)
        if lines > lines_max:
            found.append(Finding(name, " + ".join(floors), f"{lines} lines of code, at most {lines_max}"))
    return found


def _code_lines(module: Module) -> int:
    explaining: set[int] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            explaining.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(module.text.splitlines(), 1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and number not in explaining for number, line in lines)


def _dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or attribute chain, empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return f"{inner}.{node.attr}" if inner else node.attr
    return ""


def _calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, _dotted(node.func)


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module


@rule
def module_length(module: Module) -> Iterator[tuple[int, str]]:
    lines = len(module.text.splitlines())
    if lines > MODULE_LINES_MAX:
        yield lines, f"{lines} lines, at most {MODULE_LINES_MAX}"


@rule
def function_length(module: Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield node.lineno, f"{node.name} has {lines} lines, at most {FUNCTION_LINES_MAX}"


@rule
def docstring(module: Module) -> Iterator[tuple[int, str]]:
    if not ast.get_docstring(module.tree):
        yield 1, "a module says in its docstring what it is for"


@rule
def print_call(module: Module) -> Iterator[tuple[int, str]]:
    """Only the command line talks to a person; everything else logs or answers."""
    if module.floor == "cli":
        return
    for call, name in _calls(module.tree):
        if name == "print":
            yield call.lineno, "print outside cli"


@rule
def swallowed(module: Module) -> Iterator[tuple[int, str]]:
    """A handler that does nothing hides a fault; `contextlib.suppress(Named)` says what is expected and why."""
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if node.type is None:
            yield node.lineno, "bare except"
        if all(
            isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            for s in node.body
        ):
            yield node.lineno, "a handler that does nothing"
    for call, name in _calls(module.tree):
        if name.endswith("suppress") and any(_dotted(a) in ("Exception", "BaseException") for a in call.args):
            yield call.lineno, "suppresses everything"


@rule
def unsafe_loading(module: Module) -> Iterator[tuple[int, str]]:
    """Weights and messages are data: nothing that arrives from outside is ever executed."""
    for line, name in _imports(module.tree):
        if name.split(".")[0] in ("pickle", "cPickle", "dill", "shelve", "marshal"):
            yield line, f"import of {name}"
    for call, name in _calls(module.tree):
        if name in ("eval", "exec", "compile", "torch.load", "yaml.load", "os.system"):
            yield call.lineno, f"call of {name}"
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code" and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                yield call.lineno, "trust_remote_code"
            if keyword.arg == "shell" and isinstance(keyword.value, ast.Constant) and keyword.value.value:
                yield call.lineno, "shell=True"


@rule
def blocking_in_async(module: Module) -> Iterator[tuple[int, str]]:
    """One blocked loop is every stream stalled."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.AsyncFunctionDef):
            for call, name in _calls(node):
                if name in ("time.sleep", "sleep", "subprocess.run", "requests.get", "httpx.get", "httpx.post"):
                    yield call.lineno, f"{name} in async def {node.name}"


@rule
def unbounded_queue(module: Module) -> Iterator[tuple[int, str]]:
    for call, name in _calls(module.tree):
        if name.split(".")[-1] in ("Queue", "LifoQueue", "PriorityQueue") and not call.args and not call.keywords:
            yield call.lineno, f"{name}() without a bound"
        if name.split(".")[-1] == "SimpleQueue":
            yield call.lineno, "SimpleQueue has no bound"


_SENSITIVE = {
    "body",
    "prompt",
    "prompts",
    "messages",
    "content",
    "completion",
    "payload",
    "secret",
    "authorization",
    "text",
}
_LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical", "log"}


@rule
def logged_content(module: Module) -> Iterator[tuple[int, str]]:
    """No prompt, completion or secret in any log."""
    for call, name in _calls(module.tree):
        owner, _, method = name.rpartition(".")
        if method not in _LOG_METHODS or "log" not in owner.lower():
            continue
        for argument in [*call.args, *(k.value for k in call.keywords)]:
            for node in ast.walk(argument):
                label = _dotted(node) if isinstance(node, ast.Name | ast.Attribute) else ""
                if label.split(".")[-1].lower() in _SENSITIVE:
                    yield call.lineno, f"logs {label}"


@rule
def unfinished(module: Module) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(module.text.splitlines(), 1):
        if re.search(r"#.*\b(TODO|FIXME|XXX|HACK)\b", line):
            yield number, line.strip()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if _dotted(raised) == "NotImplementedError":
                yield node.lineno, "NotImplementedError: build it or leave it out"


@rule
def wall_clock_in_services(module: Module) -> Iterator[tuple[int, str]]:
    """Services are handed a Clock, so that tests and the simulator can hold time still."""
    services, pure = ("gateway", "control", "node", "billing", "batch", "sim"), ("policy", "money", "quota", "dispatch")
    if module.floor not in (*services, *pure, "wire", "domain"):
        return
    for call, name in _calls(module.tree):
        if name in ("time.time", "time.time_ns", "datetime.now", "datetime.datetime.now", "datetime.utcnow"):
            yield call.lineno, f"{name}() instead of the clock"


# --- text of the whole repository ---------------------------------------------------------------------------------

# Written in pieces so that this file does not break its own rule.
FORBIDDEN_TEXT = {
    "machine-path": re.compile(r"(?<![\w.])/(?:" + "|".join(("work" + "/", "root" + "/", "home" + "/\\w")) + ")"),
    "registry-host": re.compile(
        "|".join(("pypi" + r"\.org", "python" + "hosted", "download" + r"\.pytorch", "npm" + r"js\.org"))
    ),
    "workshop-tool": re.compile(r"\bfarm" + r"-\w|\bissues " + r"(?:show|list|new|close)\b"),
}


def text_findings(files: dict[str, str]) -> list[Finding]:
    """`files` are repository paths with their text."""
    return [
        Finding(name, f"{path}:{text.count(chr(10), 0, match.start()) + 1}", match.group())
        for path, text in files.items()
        for name, pattern in FORBIDDEN_TEXT.items()
        for match in pattern.finditer(text)
    ]
