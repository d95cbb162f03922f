"""Settings: defaults, checks, and sentences that name the value and what to do."""

from pathlib import Path

import pytest

from chat_app.settings import SettingsError, load_settings, settings_table
from chat_app.trainer_room import judge_of


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
        ("ZLOOP_JUDGE_MODEL", "big", "set both or none"),
        ("ZLOOP_JUDGE_URL", "judge:8000", "must begin with http"),
        ("ZLOOP_JUDGE_URL", "http://me:pass@judge/v1", "a judge's into ZLOOP_JUDGE_TOKEN"),
        ("ZLOOP_JUDGE_TOKEN", "a\nb", "printable ASCII"),
    ],
)
def test_a_bad_value_gets_a_sentence(name: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings({name: value})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_every_loopback_address_will_do(host: str) -> None:
    assert load_settings({"ZLOOP_HOST": host}).host == host


def test_a_judge_is_a_url_and_a_model_and_its_token_is_not_shown() -> None:
    given = {"ZLOOP_JUDGE_URL": "http://judge:8000/v1", "ZLOOP_JUDGE_MODEL": "big", "ZLOOP_JUDGE_TOKEN": "sk-4711"}
    settings = load_settings(given)
    assert "sk-4711" not in repr(settings)
    judge = judge_of(settings)
    assert judge is not None
    assert (judge.url, judge.model, judge.token) == ("http://judge:8000/v1", "big", "sk-4711")
    assert "sk-4711" not in repr(judge)
    assert judge_of(load_settings({})) is None
    with pytest.raises(SettingsError, match="one URL"):
        load_settings({**given, "ZLOOP_JUDGE_URL": "http://a/v1,http://b/v1"})
    with pytest.raises(SettingsError, match="printable ASCII") as caught:
        load_settings({**given, "ZLOOP_JUDGE_TOKEN": "sk-4711\nX: 1"})
    assert "sk-4711" not in str(caught.value)


def test_the_table_has_a_sentence_for_each_setting() -> None:
    for name, _, sentence in settings_table():
        assert name.startswith("ZLOOP_")
        assert sentence.endswith(".")
