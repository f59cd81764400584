"""Processes: everything that reads the environment, starts something or watches a clock."""
