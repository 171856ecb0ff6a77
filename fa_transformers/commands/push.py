"""The command that uploads a model folder; `scripts/push_to_hub.py` starts it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .flags import FlagParser, how_started, mistakes_in_one_line, print_json


@dataclass(frozen=True)
class PushCommand:
    """A parsed command line of an upload."""

    folder: str
    repo: str
    private: bool
    space: bool
    revision: str | None
    token: str | None = field(repr=False)


def parse(argv: Sequence[str] | None = None) -> PushCommand:
    """Parse the flags."""
    program = how_started("push", "scripts/push_to_hub.py", launcher="python")
    parser = FlagParser(
        program,
        "Check a model folder, upload it to the Hub, or the app with it as a Space, and load it back.",
        f"{program} outputs/mine OWNER/NAME --private",
    )
    parser.add_argument("folder", metavar="FOLDER", help="model folder written by fa_transformers.publish")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create the repository private")
    parser.add_argument(
        "--space", action="store_true", help="upload the app with this model, as a Space, instead of the model"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, created if it does not exist")
    parser.add_argument("--hub_token", metavar="TOKEN", help="token of the Hub (default: HF_TOKEN or the stored login)")
    parser.add_aliases(token="--hub_token", repo_id="OWNER/NAME")
    parsed = parser.parse(argv)
    given = parsed.given
    if given.get("space") and given.get("revision"):
        parsed.fail("--revision is for models: a Space runs what is on its main branch")
    return PushCommand(
        given["folder"],
        given["repo"],
        given.get("private", False),
        given.get("space", False),
        given.get("revision"),
        given.get("hub_token"),
    )


def main(argv: Sequence[str] | None = None) -> dict:
    """Push as the flags say; prints the result as one line of JSON, and a failure as one line."""
    run = parse(argv)
    with mistakes_in_one_line():
        from ..hub.login import check_login

        check_login(run.repo, run.token)  # before torch is loaded, which takes several times as long
        if run.space:
            from ..app.space import space_files
            from ..hub.space import push_space

            result = push_space(space_files(run.folder), run.repo, private=run.private, token=run.token)
        else:
            from ..hub.push import push

            result = push(run.folder, run.repo, private=run.private, revision=run.revision, token=run.token)
    print_json(result)
    return result


if __name__ == "__main__":
    main()
