"""Convert a pretrained text or image encoder to factorized attention, and write a folder ready to load or distill.

python scripts/convert_checkpoint.py minilm converted --max_length 16384 --local_window 64   # 10 s of CPU time
python scripts/convert_checkpoint.py roberta-base converted --positions interpolate --max_length 4096
python scripts/convert_checkpoint.py facebook/dinov2-small converted --image_size 1036 --key_feature_size 128

Prints what became of every tensor, then one line of JSON. Nothing is trained: the folder says so, in its card and its
config, and loading it warns. SOURCE is a folder, a repository of the Hub, or "minilm" for the installed package.
"""

from fa_transformers.commands.convert import main

if __name__ == "__main__":
    main()
