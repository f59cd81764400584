"""Inputs read as streams, whatever their size."""
