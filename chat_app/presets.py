"""Presets: named ways to be answered (a system prompt, a temperature, a longest answer) that a conversation chooses.

Where it sits: `Operations` reads `DATA_DIR/presets.yaml` once at its start; without the file there are none. Chosen on
the chat page or by `preset` in a request.

    Short:
      system_prompt: Answer in one sentence.
      temperature: 0.2
      max_tokens: 200
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from chat_app.settings import SettingsError
from feedback_store.bounded import load_yaml

FILE = "presets.yaml"
LONGEST_SYSTEM_PROMPT = 20_000


class Preset(BaseModel):
    """One way to be answered; what it does not name is as the settings say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    system_prompt: Annotated[str | None, Field(min_length=1, max_length=LONGEST_SYSTEM_PROMPT)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    max_tokens: Annotated[int | None, Field(ge=1, le=8192)] = None


_Name = Annotated[str, Field(min_length=1, max_length=60)]
_PRESETS = TypeAdapter(dict[_Name, Preset])


def load_presets(path: Path) -> Mapping[str, Preset]:
    """The presets by name, in the order of the file; none where there is no file.

    Raises SettingsError with a sentence that names what is wrong and where.
    """
    try:
        values = load_yaml(path) or {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}. Mend it or remove it.") from error
    try:
        return _PRESETS.validate_python(values)
    except ValidationError as error:
        raise SettingsError(f"{path}: {' '.join(_sentence(detail) for detail in error.errors())}") from None


def _sentence(detail: Any) -> str:
    """What is wrong, where, and what may stand there."""
    where = ".".join(str(part) for part in detail["loc"] if part != "[key]") or "the file"
    if detail["type"] == "extra_forbidden":
        return f"{where} is unknown. A preset has: {', '.join(Preset.model_fields)}."
    if detail["type"] in ("model_type", "dict_type"):
        return (
            f"{where} is {str(detail['input'])[:80]!r}, it must be keys with values: {', '.join(Preset.model_fields)}."
        )
    return f"{where} is {str(detail['input'])[:80]!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}."
