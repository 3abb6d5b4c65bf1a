"""Reading a network from its jaxpr."""
