"""The eight benchmarks under the generative protocol: the model writes the answer, its text is matched."""
