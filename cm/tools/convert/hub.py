"""A folder to the Hugging Face Hub, by its own client (extra `hub`), which knows the user's token."""

import re

from cm.errors import UserError, extra

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def checked_name(name: str, target: str) -> str:
    """OWNER/NAME of a repository; UserError for anything else."""
    if not NAME.fullmatch(name):
        raise UserError(f"{target}: a repository of the Hub is hf://OWNER/NAME")
    return name


def push(folder: str, repository: str) -> str:
    """Upload a folder as one commit; the commit's address. A repository that is new is private."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    except ImportError:
        raise UserError(f"hf:// needs huggingface_hub: {extra('hub')}") from None
    api = HfApi(library_name="consistency-models")
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export of a consistency model"
        )
    except LocalTokenNotFoundError:
        raise UserError(
            f"hf://{repository}: the Hub knows no user: `hf auth login`, or set HF_TOKEN"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise UserError(f"hf://{repository}: {first[:300]}") from error
    return str(done.commit_url)
