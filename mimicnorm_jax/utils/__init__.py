"""Trees, files, the console, the environment."""
