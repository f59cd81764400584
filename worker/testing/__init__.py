"""Tests on real servers: pytest fixtures, for Bulwark's suite and for those of others."""
