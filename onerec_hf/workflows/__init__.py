"""From tables to artefacts, in Python: what the commands of the command line call."""
