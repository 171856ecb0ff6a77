"""Train a detector or an instance segmenter with factorized attention on pictures with objects, score it, write it.

accelerate launch scripts/finetune_dense.py                                  # small digits on cluttered photographs
accelerate launch scripts/finetune_dense.py --attention none                 # the same network without blocks
accelerate launch scripts/finetune_dense.py --coco_folder coco/ --task object-detection
"""

from fa_transformers.commands.finetune_dense import main
from fa_transformers.commands.flags import mistakes_in_one_line

if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
