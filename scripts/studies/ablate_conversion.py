"""Tell which parts of a layer restore a converted model: one row per variant, the same steps and batches for each.

python scripts/studies/ablate_conversion.py --output_dir outputs/ablation                      # MiniLM on prose
python scripts/studies/ablate_conversion.py --task images --model_name_or_path dinov2/ --image_folder photos/

All variants learn side by side: the teacher runs once per step, and every variant's mixers learn from it
(`AttentionTransfer`). Then the layers are stacked, and embeddings compared with the teacher's on held-out data. Writes
ablation.json and ablation.txt, and ends with one line of JSON.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from fa_transformers.commands.flags import mistakes_in_one_line, script_parser
from fa_transformers.files import write_json, write_text
from fa_transformers.options import CardOptions, DataOptions, LoopOptions, ModelOptions, resolve
from fa_transformers.studies.conversion_ablation import RECIPE, AblationJob, AblationOptions, run_ablation
from fa_transformers.tables import format_table


def parse(argv: Sequence[str] | None = None) -> AblationJob:
    """Return the ablation that the flags ask for, checked."""
    recipe = RECIPE | {"output_dir": Path("outputs/ablation")}
    parser = script_parser("python scripts/studies/ablate_conversion.py", __doc__, lambda given: recipe)
    parser.add_options(AblationOptions, ("ablation",), "ablation")
    parser.add_options(DataOptions, ("text", "images"), "data (none of these = prose of installed Python packages)")
    parser.add_options(ModelOptions, ("model_name_or_path", "max_length", "image_size"), "teacher")
    training = ("learning_rate", "max_tokens_per_batch", "per_device_eval_batch_size", "seed")
    machine = ("mixed_precision", "use_cpu", "num_threads", "output_dir")
    parser.add_options(LoopOptions, (*training, *machine), "training")
    parsed = parser.parse(argv)
    options = (resolve(parsed[kind], recipe) for kind in (DataOptions, ModelOptions, LoopOptions))
    job = AblationJob(parsed[AblationOptions], *options, CardOptions())
    try:
        job.check()
    except ValueError as error:
        parsed.fail(str(error))
    return job


def main(argv: Sequence[str] | None = None) -> dict:
    job = parse(argv)
    result = run_ablation(job)
    folder, rows = job.loop.output_dir, result["rows"]
    write_json(folder / "ablation.json", result)
    table = format_table(rows, list(rows[0]))
    write_text(folder / "ablation.txt", table + "\n")
    print(table)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
