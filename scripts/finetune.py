"""Fine-tune a factorized encoder on long documents or large images, score it, and write a folder ready to publish.

accelerate launch scripts/finetune.py                                # licence documents: 9 min on 2 CPU cores, 0.60
accelerate launch scripts/finetune.py --full_recipe                  # 4.1 M tokens, whole documents at the end: 0.62
accelerate launch scripts/finetune.py --task image-classification    # digits on 1,024 px canvases: 10 min, 0.94
accelerate launch scripts/finetune.py --train_file my.csv --model_name_or_path bert-base-uncased
"""

from fa_transformers.commands.finetune import main
from fa_transformers.commands.flags import mistakes_in_one_line

if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
