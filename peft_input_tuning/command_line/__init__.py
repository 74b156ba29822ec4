"""The command line, all that prints: a file for each command, and what they share."""
