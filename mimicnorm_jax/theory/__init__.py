"""Mean-field theory of wide networks at initialization, and its numerical verification."""
