"""A data set on its way to a Hugging Face hub, private unless somebody asks for public.

    dataset_export.write_dataset → folder → push → one commit on the hub

What is sent is a folder that ``write_dataset`` wrote, its rows unchanged (the card may be completed by hand): nothing
else can be sent by mistake. A data set of the hub is written over only where it is an earlier push; files that the new
export has no longer are removed from it. Its history keeps them: to take words back, remove the data set on the hub.
Not covered: time limits while uploading (the hub's library sets none), branches, pull requests.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from feedback_store.dataset_card import MANIFEST
from feedback_store.dataset_export import CARD, DATASET_FILES, DatasetFiles, load_dataset_files
from feedback_store.errors import Conflict, PushRefused

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, HfApi
    from huggingface_hub.errors import HfHubHTTPError

_ID_SENTENCE = "Give owner/name of a data set."
_COMMIT_MESSAGE = "Export from Zephyr Loop"
_FIRST_ANSWER_TIMEOUT_S = 20.0
# What a hub puts into a new data set by itself.
_FILES_OF_THE_HUB = (".gitattributes", CARD)


def push(
    directory: Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Send an exported data set to ``owner/name`` on the hub, which is created where it is not there; the commit's URL.

    ``token`` is the hub's access token, from ``HF_TOKEN`` or the hub's own login where it is None; ``endpoint`` is the
    hub's address where it is not the usual one. With ``private``, a data set that is public is refused; without it, one
    that is private stays so. Raises ``PushRefused``. A push that broke off can be made again.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        dataset = load_dataset_files(directory)
    except Conflict as conflict:
        raise PushRefused(repo_id, f"{conflict} Export it anew, then push.") from conflict
    if "/" not in repo_id:
        raise PushRefused(repo_id, f"its owner is missing. {_ID_SENTENCE}")
    api = HfApi(endpoint=endpoint, token=_checked_token(repo_id, token))
    try:
        return _upload(api, dataset, repo_id, private)
    except HFValidationError as error:
        raise PushRefused(repo_id, f"{error} {_ID_SENTENCE}") from error
    except HfHubHTTPError as error:
        raise PushRefused(repo_id, _refusal(error, api.endpoint, repo_id)) from error
    # OSError has offline mode and what the uploader of large files raises, as has RuntimeError.
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError) as error:
        raise PushRefused(
            repo_id, f"the hub {api.endpoint} cannot be reached ({error}). Check the network and push again."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise PushRefused(
            repo_id, f"the hub {api.endpoint} gave no proper answer ({error}). Check its address and the {CARD}."
        ) from error


def _upload(api: HfApi, dataset: DatasetFiles, repo_id: str, private: bool) -> str:
    info = _ensure_repo(api, repo_id, private)
    if private and info.private is not True:
        raise PushRefused(
            repo_id,
            f"it is public on {api.endpoint}, and a private push was asked for. Nothing was sent. "
            "Make it private there, name another, or ask for a public push.",
        )
    there = {sibling.rfilename for sibling in info.siblings or []}
    if MANIFEST not in there and (foreign := sorted(there.difference(_FILES_OF_THE_HUB))):
        raise PushRefused(
            repo_id,
            f"it holds files that no export wrote ({', '.join(foreign[:3])}). Nothing was sent. Name another.",
        )
    gone = sorted(there.intersection(DATASET_FILES).difference(dataset.names))
    commit = api.upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=dataset.directory,
        allow_patterns=list(dataset.names),
        delete_patterns=gone or None,
        commit_message=_COMMIT_MESSAGE,
    )
    return str(commit.commit_url)


def _ensure_repo(api: HfApi, repo_id: str, private: bool) -> DatasetInfo:
    """The data set on the hub, created where it is not there. Asked first with a time limit, so that silence ends."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.dataset_info(repo_id, timeout=_FIRST_ANSWER_TIMEOUT_S)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        return api.dataset_info(repo_id, timeout=_FIRST_ANSWER_TIMEOUT_S)


def _checked_token(repo_id: str, token: str | None) -> str:
    from huggingface_hub import get_token

    found = (token if token is not None else get_token() or "").strip()
    if not found:
        raise PushRefused(
            repo_id, "there is no token. Make one with write permission in the settings of the hub and set HF_TOKEN."
        )
    # A token with other characters cannot stand in a header, and the error about that would show it.
    if not (found.isascii() and found.isprintable() and " " not in found):
        raise PushRefused(repo_id, "the token has spaces or other characters no token has. Copy it again.")
    return found


def _refusal(error: HfHubHTTPError, endpoint: str, repo_id: str) -> str:
    owner = repo_id.partition("/")[0]
    status = error.response.status_code
    if status == 401:
        return f"the hub {endpoint} does not know the token (401). Make a new one there and set HF_TOKEN."
    if status == 403:
        return (
            f"the token may not write there (403). Use one with write permission for {owner}, or name another data set."
        )
    if status == 404:
        return f"the hub {endpoint} has no such owner or data set (404), or the token may not see it. Check the name."
    said = f": {error.server_message}" if error.server_message else ""
    return f"the hub {endpoint} answered {status}{said}. Try again later."
