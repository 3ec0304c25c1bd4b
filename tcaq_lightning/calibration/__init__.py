"""The loop: rounds, units, one fit, the streams of activations, and what is kept on disk to resume."""
