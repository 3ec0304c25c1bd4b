"""The side of diffusers: pipelines, families of denoisers, sampling, recorded calls, the graph of units."""
