"""How models are judged: benchmarks under the generative protocol, likelihoods, and how texts read."""
