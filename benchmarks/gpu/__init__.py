"""The kernels on a GPU: are they right, what bounds them, how fast are they. ``benchmarks/gpu.sh`` runs it all."""
