"""Full-precision models: training of the shipped ones, conversion of published checkpoints."""
