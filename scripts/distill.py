"""Recover the quality of a converted model: it learns from the softmax model that its weights came from.

accelerate launch scripts/distill.py --recipe quick                  # FA-MiniLM, 15 minutes of two CPU cores
accelerate launch scripts/distill.py --recipe full                   # FA-MiniLM, an hour of two CPU cores
accelerate launch scripts/distill.py --model_name_or_path converted/ --teacher_name_or_path bert/ --train_file my.jsonl
accelerate launch scripts/distill.py --task images --image_folder photos/     # FA-DINOv2-S
"""

from fa_transformers.commands.distill import main
from fa_transformers.commands.flags import mistakes_in_one_line

if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
