"""What the fields of requests can hold: lengths, and the alphabet of names that can become part of a path.

Where it sits: under the models and routes of the API. Every text of a request has one of these types or a length of its
own (`tests/security/test_naughty_strings.py` looks); what holds of every text is in `request_text.py`. The rooms
behind check again whether a name can be one of theirs (`feedback_store.durable.is_plain_name`).
"""

from typing import Annotated

from fastapi import Path
from pydantic import Field

from feedback_store.durable import LONGEST_NAME, PLAIN_NAME

_Named = Field(min_length=1, max_length=LONGEST_NAME, pattern=PLAIN_NAME)

Id = Annotated[str, _Named]
"""Of a pair, a candidate, a version."""
PathId = Annotated[str, Path(min_length=1, max_length=LONGEST_NAME, pattern=PLAIN_NAME)]
"""The same where it stands in the path."""
ModelName = Annotated[str, Field(max_length=200)]
PresetName = Annotated[str, Field(max_length=60)]
RecipeName = Annotated[str, Field(min_length=1, max_length=1_000)]
Taste = Annotated[str, Field(min_length=1, max_length=60)]
Stop = Annotated[str, Field(max_length=1_000)]
Reason = Annotated[str, Field(min_length=1, max_length=500)]
Flag = Annotated[bool, Field(strict=True)]
"""true or false, and no other word for them."""
IdempotencyKey = Annotated[str | None, Field(min_length=1, max_length=200)]
