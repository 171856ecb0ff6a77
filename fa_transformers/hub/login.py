"""The login that an upload needs, asked for before anything else; nothing here loads torch."""

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..mistakes import Mistake
from ..redaction import keep_secret, redact

LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or give --hub_token"


class PushError(Mistake, RuntimeError):
    """An upload did not complete; the message names the step, the cause and how to go on."""


def check_login(repo_id: str, token: str | None = None) -> str:
    """Check that an upload to `repo_id` can begin: its name is sound, and the Hub knows the token.

    Args:
        repo_id: "owner/name", or a name under the token's account.
        token: of the Hub; None uses HF_TOKEN or the stored login.

    Returns:
        The name of the account.

    Raises:
        PushError: the name is none that a repository can have, there is no token, the Hub refuses it or lets it read
            only, or the Hub can't be reached. Nothing was sent.
    """
    keep_secret(token)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(
            f"{repo_id!r} is no name of a repository: give 'owner/name', or a name alone, of letters, digits, '-', '_' "
            "and '.'. Nothing was sent."
        ) from error
    token = token or get_token()
    if token is None:
        raise PushError(f"you are not logged in to the Hub: {LOG_IN}. Nothing was sent.")
    try:
        account = HfApi(token=token).whoami()
    except OfflineModeIsEnabled as error:
        raise PushError("HF_HUB_OFFLINE is set, so the Hub can't be reached: unset it. Nothing was sent.") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise PushError(
                f"the Hub refuses the token ({describe_cause(error)}): {LOG_IN}, with a token that may write. Nothing "
                "was sent."
            ) from error
        raise PushError(f"the Hub can't say who you are ({describe_cause(error)}). Nothing was sent.") from error
    except Exception as error:  # of the client's HTTP library, which is another one in each of its versions
        raise PushError(
            f"the Hub can't be reached ({describe_cause(error)}): look after the network and try again. Nothing was "
            "sent."
        ) from error
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PushError(f"the token of {account['name']} may only read: {LOG_IN}, with one that may write. Nothing was "
                        "sent.")  # fmt: skip
    return account["name"]


def describe_cause(error: BaseException) -> str:
    """Return an error and what caused it as one line without tokens; what one of them repeats is said once."""
    texts: list[str] = []
    for cause in (error, error.__cause__):
        text = " ".join(str(cause).split()) if cause is not None else ""
        if text and not any(text in said for said in texts):
            texts = [said for said in texts if said not in text] + [text]
    return redact(": ".join(texts) or type(error).__name__)
