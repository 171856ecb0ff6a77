"""Train a stereo network with factorized attention on rectified pairs, score its disparities, write its folder.

accelerate launch scripts/finetune_stereo.py                          # generated scenes with exact disparities
accelerate launch scripts/finetune_stereo.py --attention_blocks       # the same network without attention blocks
accelerate launch scripts/finetune_stereo.py --train_folder SceneFlow/ --max_disparity 192
"""

from fa_transformers.commands.finetune_stereo import main
from fa_transformers.commands.flags import mistakes_in_one_line

if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
