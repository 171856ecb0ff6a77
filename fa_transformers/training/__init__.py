"""What a training run needs: flags, accelerator, loaders, optimiser, loop, checkpoints and its report."""
