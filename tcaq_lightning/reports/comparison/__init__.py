"""Finished runs side by side: intervals, tables, pictures."""
