"""The processes of a run: how they start, where they run, and how they communicate."""
