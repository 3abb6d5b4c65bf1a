"""The recipes that `--config=configs/NAME.py` names, wherever the command is called."""
