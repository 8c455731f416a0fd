"""A run as a folder: its configuration, events, results by unit of work, checkpoints and report."""
