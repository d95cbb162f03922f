"""Settings: defaults, checks, and sentences that name the value and what to do."""

from pathlib import Path

import pytest

from chat_app.settings import SettingsError, load_settings, settings_table


def test_defaults() -> None:
    settings = load_settings({})
    assert (settings.host, settings.port, settings.engine, settings.model) == ("127.0.0.1", 7860, "llama", "auto")
    assert settings.data_dir == Path.cwd() / "data"


def test_values_are_read_from_the_environment_and_other_variables_left_alone(tmp_path: Path) -> None:
    settings = load_settings({"ZLOOP_DATA_DIR": str(tmp_path), "ZLOOP_PORT": "9000", "HOME": "/nowhere"})
    assert (settings.data_dir, settings.port) == (tmp_path, 9000)


def test_an_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"ZLOOP_PROT.*ZLOOP_PORT"):
        load_settings({"ZLOOP_PROT": "9000"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ZLOOP_PORT", "seventy", "ZLOOP_PORT='seventy'"),
        ("ZLOOP_PORT", "70000", "65535"),
        ("ZLOOP_HOST", "0.0.0.0", "loopback"),
        ("ZLOOP_HOST", "example.com", "loopback"),
        ("ZLOOP_ENGINE", "vllm", "or 'scripted'"),
        ("ZLOOP_RETRAIN_EVERY", "-1", "ZLOOP_RETRAIN_EVERY='-1'"),
        ("ZLOOP_LAUNCHER", "kubernetes", "or 'ray'"),
        ("ZLOOP_SLURM_OPTIONS", "--partition gpu", "every option must begin with -"),
        ("ZLOOP_SLURM_OPTIONS", "--comment='a", "no closing quotation"),
        ("ZLOOP_RAY_ADDRESS", "head:8265", "ZLOOP_RAY_ADDRESS='head:8265'"),
        ("ZLOOP_COMPARE_SHARE", "1.5", "less than or equal to 1"),
    ],
)
def test_a_bad_value_gets_a_sentence(name: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings({name: value})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_every_loopback_address_will_do(host: str) -> None:
    assert load_settings({"ZLOOP_HOST": host}).host == host


def test_the_table_has_a_sentence_for_each_setting() -> None:
    for name, _, sentence in settings_table():
        assert name.startswith("ZLOOP_")
        assert sentence.endswith(".")
