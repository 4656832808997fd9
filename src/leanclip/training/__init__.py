"""Training runs: plan, loop, step, optimiser, fine-tuning and checkpoints."""
