"""The commands: parse, call, print. No logic of their own, and nothing heavy is imported before a command runs."""
