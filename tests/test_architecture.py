"""The arrows of the house: chat_app → feedback_store ← trainer, and what a child or a chat never imports."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("chat_app", "feedback_store", "trainer")
REACH_THE_TRAINER = {"chat_app.__main__", "chat_app.cli", "chat_app.engines", "chat_app.trainer_room"}
HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """Every module a file imports, at its top or inside a function; names imported from a package count as modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> dict[str, set[str]]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {module_name(path): set(imports_of(path)) for path in files}


def package_of(name: str) -> str:
    return name.partition(".")[0]


def test_the_test_sees_the_house() -> None:
    found = modules()
    assert {"chat_app.api", "feedback_store.store", "trainer.cycle"} <= found.keys()
    assert "feedback_store.store" in found["chat_app.operations"]


def test_the_store_knows_neither_neighbour() -> None:
    allowed = {"duckdb", "orjson", "pyarrow", "feedback_store", *sys.stdlib_module_names}
    extra = {
        "feedback_store.agreement": {"nltk"},
        "feedback_store.bounded": {"yaml"},
        "feedback_store.dataset_card": {"huggingface_hub"},
        "feedback_store.hub": {"huggingface_hub", "httpx2"},
        "feedback_store.importers.sources": {"huggingface_hub", "httpx2"},
        "feedback_store.redaction": {"detect_secrets", "phonenumbers"},
    }
    for name, imported in modules().items():
        if package_of(name) == "feedback_store":
            strangers = {one for one in imported if package_of(one) not in allowed | extra.get(name, set())}
            assert not strangers, f"{name} imports {strangers}"


def test_only_the_composition_root_reaches_the_trainer() -> None:
    for name, imported in modules().items():
        if package_of(name) == "chat_app" and name not in REACH_THE_TRAINER:
            assert not {one for one in imported if package_of(one) == "trainer"}, name


def test_the_trainer_does_not_know_the_chat_nor_the_database() -> None:
    for name, imported in modules().items():
        if package_of(name) == "trainer":
            assert not {one for one in imported if package_of(one) == "chat_app"}, name
            assert not {
                one for one in imported if one.startswith(("feedback_store.store", "feedback_store.database"))
            }, name
            assert "duckdb" not in imported, name


def test_gradio_stays_in_the_pages() -> None:
    for name, imported in modules().items():
        if not name.startswith("chat_app.ui"):
            assert not {one for one in imported if package_of(one) == "gradio"}, name


@pytest.mark.parametrize("name", ["chat_app.__main__", "chat_app.cli", "chat_app.ui.mount", "trainer.supervisor"])
def test_serving_imports_nothing_heavy(name: str) -> None:
    code = f"import sys, {name}; print(','.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_a_training_child_reads_snapshots_without_the_database() -> None:
    code = "import sys, feedback_store.snapshots, trainer.job; print('duckdb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
