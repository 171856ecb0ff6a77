"""The parts of a training run: flags, accelerator, loaders, optimiser, loop, checkpoints and its report."""
