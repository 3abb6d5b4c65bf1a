"""In which regime a network is: mean-field theory of its initialisation. Knows nothing of models or training."""
