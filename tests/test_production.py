"""The compose files and the page about them: they parse, and hold what the engine `remote` needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from chat_app.settings import load_settings

ROOT = Path(__file__).parent.parent
FILES = ("compose.vllm.yaml", "compose.tgi.yaml")


def compose(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / name).read_text(encoding="utf-8"))


def servers(name: str) -> dict[str, dict[str, Any]]:
    return {key: value for key, value in compose(name)["services"].items() if key != "zephyr-loop"}


@pytest.mark.parametrize("name", FILES)
def test_model_servers_are_pinned_healthy_on_loopback_and_see_the_versions_read_only(name: str) -> None:
    for service in servers(name).values():
        image, _, tag = service["image"].rpartition(":")
        assert image
        assert tag[-1].isdigit()
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert "../data/versions:/versions:ro" in service["volumes"]
        assert service["healthcheck"]["test"][0] == "CMD"
        devices = service["deploy"]["resources"]["reservations"]["devices"]
        assert devices[0]["capabilities"] == ["gpu"]


@pytest.mark.parametrize("name", FILES)
def test_the_product_waits_for_its_server_and_its_settings_are_good(name: str, tmp_path: Path) -> None:
    service = compose(name)["services"]["zephyr-loop"]
    assert {wait["condition"] for wait in service["depends_on"].values()} == {"service_healthy"}
    given = {key: value for key, value in service["environment"].items() if not str(value).startswith("${")}
    settings = load_settings({**given, "ZLOOP_DATA_DIR": str(tmp_path)})
    assert settings.engine == "remote"
    ports = [port.split(":")[1] for server in servers(name).values() for port in server["ports"]]
    assert settings.remote_url == ",".join(f"http://127.0.0.1:{port}" for port in ports)
    assert "../data:/data" in service["volumes"]


def test_vllm_can_load_adapters_while_it_runs() -> None:
    vllm = servers("compose.vllm.yaml")["vllm"]
    assert vllm["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert "--enable-lora" in vllm["command"]
    options = dict(option.split("=", 1) for option in vllm["command"] if "=" in option)
    assert int(options["--max-loras"]) >= 2
    product = compose("compose.vllm.yaml")["services"]["zephyr-loop"]["environment"]
    assert product["ZLOOP_REMOTE_ADAPTER_DIR"] == "/versions"
    assert product["ZLOOP_REMOTE_KEY"] == vllm["environment"]["VLLM_API_KEY"]
    assert product["ZLOOP_MODEL"] == options["--model"]


def test_tgi_is_there_twice_and_no_adapters_are_set_to_nothing() -> None:
    both = servers("compose.tgi.yaml")
    assert [server["env_file"][0]["path"] for server in both.values()] == ["blue.env", "green.env"]
    assert not any("LORA_ADAPTERS" in str(server) for server in both.values())


def test_the_page_names_files_and_settings_that_exist() -> None:
    page = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
    assert all(f"deploy/{name}" in page for name in FILES)
    settings = {f"ZLOOP_{name.upper()}" for name in type(load_settings({})).model_fields}
    named = {word.strip("`*=.,:();“”").split("=")[0] for word in page.split() if "ZLOOP_" in word and "`" in word}
    assert {word for word in named if word.startswith("ZLOOP_")} <= settings
