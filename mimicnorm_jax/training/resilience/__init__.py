"""What keeps a run alive: checkpoints, preemption, non-finite steps."""
