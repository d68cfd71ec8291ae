"""One file a command: its flags, and what it runs. Heavy imports are inside `main`, so that the help text is quick."""
