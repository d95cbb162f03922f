"""The README is true: its tree is the tree, its settings, commands and routes are the code's, its pictures exist."""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

from typer.main import get_command

from chat_app.api import create_api
from chat_app.cli import app
from chat_app.settings import settings_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tracked(pattern: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", pattern], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return set(listed.split())


def tree_paths() -> set[str]:
    """The files named in the README's tree: a folder ends with `/` and indents what is in it."""
    block = README.split("<!-- tree -->")[1].split("```")[1]
    folders: list[tuple[int, str]] = []
    paths = set()
    for line in block.splitlines()[1:]:
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        name = line.split()[0]
        folders = [folder for folder in folders if folder[0] < indent]
        path = "".join(folder for _, folder in folders) + name
        if name.endswith("/"):
            folders.append((indent, name))
        else:
            paths.add(path)
    return paths


def test_the_tree_names_every_module_and_nothing_else() -> None:
    modules = {
        path
        for package in ("chat_app", "feedback_store", "trainer")
        for path in tracked(f"{package}/*.py")
        if not path.endswith("__init__.py")
        or path in ("feedback_store/importers/__init__.py", "trainer/launchers/__init__.py")
    }
    in_tree = {path for path in tree_paths() if path.endswith(".py")}
    assert in_tree == modules


def test_other_files_of_the_tree_exist() -> None:
    assert [path for path in tree_paths() if not (ROOT / path).exists()] == []


def test_every_setting_stands_in_the_readme_with_its_default() -> None:
    for name, default, sentence in settings_table():
        assert f"| `{name}` | `{default}` | {sentence} |" in README


def test_every_command_stands_in_the_readme() -> None:
    for name in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"`zloop {name}" in README, name


def test_every_route_stands_in_the_readme() -> None:
    routes = create_api(SimpleNamespace(data=None, watching=None), {}).openapi()["paths"]  # type: ignore[arg-type]
    for path, methods in routes.items():
        for method in methods:
            assert f"{method.upper()} {path}" in README, f"{method.upper()} {path}"


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", README)) | set(
        re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE)
    )
    assert named
    assert named <= targets


def test_every_link_to_a_file_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_every_pin_is_exact_and_every_dependency_pinned() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^=]+", pin) for pin in pins)
    pinned = {pin.partition("==")[0].lower().replace("_", "-") for pin in pins}
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'"([A-Za-z0-9_-]+)>=', project)
    assert {name.lower().replace("_", "-") for name in wanted} - {"setuptools"} <= pinned
