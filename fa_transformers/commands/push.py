"""The command that uploads a model folder; `scripts/push_to_hub.py` starts it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..redaction import redact
from .flags import FlagParser, how_started, print_json


@dataclass(frozen=True)
class PushCommand:
    """A parsed command line of an upload."""

    folder: str
    repo: str
    private: bool
    revision: str | None
    token: str | None = field(repr=False)


def parse(argv: Sequence[str] | None = None) -> PushCommand:
    """Parse the flags."""
    program = how_started("push", "scripts/push_to_hub.py", launcher="python")
    parser = FlagParser(
        program,
        "Check a model folder, upload it to the Hub and load it back.",
        f"{program} outputs/mine OWNER/NAME --private",
    )
    parser.add_argument("folder", metavar="FOLDER", help="model folder written by fa_transformers.publish")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, created if it does not exist")
    parser.add_argument("--hub_token", metavar="TOKEN", help="token of the Hub (default: HF_TOKEN or the stored login)")
    given = parser.parse(argv).given
    return PushCommand(
        given["folder"], given["repo"], given.get("private", False), given.get("revision"), given.get("hub_token")
    )


def main(argv: Sequence[str] | None = None) -> dict:
    """Push as the flags say; prints the result as one line of JSON, and a failure as one line."""
    run = parse(argv)
    from ..hub.card import FactError
    from ..hub.push import PushError, push
    from ..hub.self_check import SelfTestError

    try:
        result = push(run.folder, run.repo, private=run.private, revision=run.revision, token=run.token)
    except (FactError, SelfTestError, PushError, OSError) as error:
        raise SystemExit(redact(f"error: {error}")) from error
    print_json(result)
    return result


if __name__ == "__main__":
    main()
