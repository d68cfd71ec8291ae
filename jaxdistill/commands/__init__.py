"""One file a command: its flags, and what runs once they are read. Imports of weight wait until a command runs."""
