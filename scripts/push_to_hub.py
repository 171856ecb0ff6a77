"""Upload a model folder that `fa_transformers.publish` (or scripts/finetune.py) wrote to the Hugging Face Hub.

    python scripts/push_to_hub.py out/model OWNER/NAME [--private] [--space] [--revision BRANCH] [--hub_token hf_...]

1. Checks the folder: loads it in a fresh process without this package and compares its outputs with its self-test.
2. Uploads weights and code, as one commit.
3. Loads that commit back from the Hub in a fresh process and compares again.
4. Uploads the model card, whose loading snippet pins the commit.

With --space it uploads the app with this model instead: its start, front matter, requirements, this package and the
model's folder, as a Space that needs nothing else.

Prints one line of JSON. If it stops half-way, run the same command again: what was sent is kept. Takes about 20 s
beside the transfer itself. Needs a token with write permission: --hub_token, HF_TOKEN, or `hf auth login`.
"""

from fa_transformers.commands.push import main

if __name__ == "__main__":
    main()
