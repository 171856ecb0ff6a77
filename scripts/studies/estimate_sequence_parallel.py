"""Estimate the time of one encoder layer whose tokens are shared by several GPUs, from FLOPs and bytes: nothing is run.

python scripts/studies/estimate_sequence_parallel.py    # the table of docs/results/parallel.md
"""

import json
import math
from collections.abc import Sequence

from fa_transformers.commands.flags import script_parser

WIDTH, HEADS, BYTES = 768, 12, 2  # BERT-base in bfloat16
HEAD_WIDTH = WIDTH // HEADS
FLOPS = 400e12  # per second and GPU in matrix products: 40 % of an H100's peak
MEMORY = 3e12  # bytes per second
PASSES = 16  # over [tokens, width] in float32, of the factorized operator without fused kernels
LINKS = {8: 450e9, 64: 50e9}  # bytes per second and GPU each way: within a node; between nodes
LATENCY = 10e-6  # seconds per message


def seconds_of_layer(num_tokens: int, num_gpus: int) -> dict[str, dict[str, float]]:
    """Return the seconds of computing, of exchanging and of both, forward, for each way of sharing a document."""
    own, link, hops = num_tokens / num_gpus, LINKS[num_gpus], num_gpus - 1
    linear = 24 * own * WIDTH**2 / FLOPS  # the four projections and the feed-forward part
    factorized = linear + max(4 * own * WIDTH * HEAD_WIDTH / FLOPS, PASSES * own * WIDTH * 4 / MEMORY)
    softmax = linear + 4 * own * num_tokens * WIDTH / FLOPS
    context = HEADS * HEAD_WIDTH * (HEAD_WIDTH + 2) * 4  # maximum, sum and context in float32
    all_reduces = 2 * 2 * math.log2(num_gpus) * LATENCY + 2 * hops / num_gpus * context / link
    ring = hops * (LATENCY + 2 * own * WIDTH * BYTES / link)  # keys and values go round
    all_to_alls = 4 * (hops * LATENCY + hops / num_gpus * own * WIDTH * BYTES / link)  # Q, K, V and the output
    return {
        "factorized": {"compute": factorized, "exchange": all_reduces, "layer": factorized + all_reduces},
        "ring attention": {"compute": softmax, "exchange": ring, "layer": max(softmax, ring)},
        "Ulysses": {"compute": softmax, "exchange": all_to_alls, "layer": softmax + all_to_alls},
    }


def main(argv: Sequence[str] | None = None) -> None:
    script_parser("python scripts/studies/estimate_sequence_parallel.py", __doc__).parse(argv)
    print("| tokens | GPUs | way | computing, ms | exchange, ms | layer, ms |\n| --- | --- | --- | --- | --- | --- |")
    rows = []
    for num_tokens in (2**20, 2**24):
        for num_gpus in LINKS:
            for way, seconds in seconds_of_layer(num_tokens, num_gpus).items():
                figures = [f"{1e3 * value:,.2f}" for value in seconds.values()]
                print("|", " | ".join([f"{num_tokens // 2**20} Mi", str(num_gpus), way, *figures]), "|")
                rows.append({"tokens": num_tokens, "gpus": num_gpus, "way": way} | seconds)
    print(json.dumps({"layers": rows}))


if __name__ == "__main__":
    main()
