"""The training loop behind `train.py`: config, state, step, devices, checkpoints, logs."""
