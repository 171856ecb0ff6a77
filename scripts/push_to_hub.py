"""Upload a model folder that `fa_transformers.publish` (or scripts/finetune.py) wrote to the Hugging Face Hub.

    python scripts/push_to_hub.py out/model OWNER/NAME [--private] [--revision BRANCH] [--hub_token hf_...]

1. Checks the folder: loads it in a fresh process without this package and compares its outputs with its self-test.
2. Uploads weights and code, as one commit.
3. Loads that commit back from the Hub in a fresh process and compares again.
4. Uploads the model card, whose loading snippet pins the commit.

Prints one line of JSON. If it stops half-way, run the same command again: what was sent is kept. Takes about 20 s
beside the transfer itself. Needs a token with write permission: --hub_token, HF_TOKEN, or `hf auth login`.
"""

import argparse
import json

from fa_transformers.hub.card import FactError
from fa_transformers.hub.publish import PushError, SelfTestError, push_folder


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check a model folder, upload it to the Hub and load it back.")
    parser.add_argument("folder", help="model folder written by fa_transformers.publish")
    parser.add_argument("repo", help="OWNER/NAME on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create the repository private")
    parser.add_argument("--revision", help="branch to push to, created if it does not exist (default: main)")
    parser.add_argument("--hub_token", help="token of the Hub (default: HF_TOKEN or the stored login)")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    try:
        result = push_folder(args.folder, args.repo, private=args.private, revision=args.revision, token=args.hub_token)
    except (FactError, SelfTestError, PushError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(json.dumps(result))


if __name__ == "__main__":
    main(parse_args())
